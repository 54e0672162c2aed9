//! Queries that take time or wait for the guest; each runs on a thread of its own.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use api::{Endpoint, VmState};
use serde::Serialize;
use virtio_devices::Unpoisoned;

use super::failure::{self, request_failed};
use super::http::{Answer, Reply, Status};
use crate::control::{LifecycleError, RequestError};
use crate::threads::{QUERY_THREAD, ThreadKind, ThreadStart};
use crate::view::PublishedView;
use crate::vm::{BalloonStatsError, MachineObserver};

/// Maximum number of concurrent queries. It exceeds the number of connections, so that only clients that do not wait
/// for their response reach the limit.
const QUERIES_MAX: usize = 16;
const QUERY_STACK_BYTES: usize = 256 << 10;
/// How long a pause of reporting waits for the guest's confirmation. A guest that reports hands over its batches within
/// milliseconds; a guest that takes longer is stuck, and its reports are completed without discarding.
const PAUSE_WAIT: Duration = Duration::from_secs(5);

/// A query that failed.
#[derive(Debug, thiserror::Error)]
enum QueryError {
    #[error("{}", endpoint.failure())]
    Observer {
        endpoint: Endpoint,
        #[source]
        cause: BalloonStatsError,
    },
    #[error("Cannot start a thread for the request")]
    Thread(#[source] std::io::Error),
    #[error("{QUERIES_MAX} queries are already in progress")]
    TooMany,
}

/// Queries the machine on separate threads.
#[derive(Clone)]
pub(super) struct Queries {
    view: Arc<PublishedView>,
    thread_start: ThreadStart,
    under_way: Arc<AtomicUsize>,
}

impl Queries {
    pub(super) fn new(view: Arc<PublishedView>, thread_start: ThreadStart) -> Self {
        Self {
            view,
            thread_start,
            under_way: Arc::default(),
        }
    }

    /// Responds with the state of reporting once a requested pause is complete. It does not wait for a guest that is
    /// not running.
    pub(super) fn reporting(&self, reply: Reply) {
        let machine = self.view.get().machine.clone();
        let runs = machine.is_some_and(|machine| machine.state == VmState::Running);
        let patience = if runs { PAUSE_WAIT } else { Duration::ZERO };
        self.ask(Endpoint::VmBalloonReporting, reply, move |observer| {
            observer.reporting(Instant::now() + patience)
        });
    }

    /// Queries the machine on a thread of its own: it may have to wait for the guest, and a guest may be stuck.
    pub(super) fn ask<T: Serialize + 'static>(
        &self,
        endpoint: Endpoint,
        reply: Reply,
        ask: impl FnOnce(&dyn MachineObserver) -> Result<T, BalloonStatsError> + Send + 'static,
    ) {
        let view = self.view.get();
        let machine = match &view.machine {
            // Only a running guest can refill its statistics.
            Some(machine)
                if endpoint != Endpoint::VmBalloonStats || machine.state == VmState::Running =>
            {
                machine
            }
            _ => {
                let cause = LifecycleError::VmNotRunning;
                reply.send(request_failed(RequestError { endpoint, cause }));
                return;
            }
        };
        let Some(ticket) = Ticket::take(&self.under_way) else {
            reply.send(failure::answer(
                Status::ServiceUnavailable,
                QueryError::TooMany,
            ));
            return;
        };
        let observer = Arc::clone(&machine.observer);
        let thread_start = Arc::clone(&self.thread_start);
        // Shared with this thread only in case no other can be started.
        let reply = Arc::new(Mutex::new(Some(reply)));
        let own_reply = Arc::clone(&reply);
        let spawned = std::thread::Builder::new()
            .name(QUERY_THREAD.to_owned())
            .stack_size(QUERY_STACK_BYTES)
            .spawn(move || {
                thread_start(ThreadKind::ApiQuery);
                let answer = match ask(&*observer) {
                    Ok(value) => Answer::json(&value),
                    Err(cause) => failure::answer(
                        Status::InternalServerError,
                        QueryError::Observer { endpoint, cause },
                    ),
                };
                drop(ticket);
                send_once(&own_reply, answer);
            });
        if let Err(error) = spawned {
            let answer = failure::answer(Status::InternalServerError, QueryError::Thread(error));
            send_once(&reply, answer);
        }
    }
}

fn send_once(reply: &Mutex<Option<Reply>>, answer: Answer) {
    let taken = reply.lock().unpoisoned().take();
    if let Some(reply) = taken {
        reply.send(answer);
    }
}

/// One of the [`QUERIES_MAX`] slots, released when dropped.
struct Ticket(Arc<AtomicUsize>);

impl Ticket {
    fn take(queries: &Arc<AtomicUsize>) -> Option<Self> {
        queries
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |count| {
                (count < QUERIES_MAX).then_some(count + 1)
            })
            .ok()?;
        Some(Self(Arc::clone(queries)))
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}
