//! Queries that take time or wait for the guest; each occupies a thread until it is answered.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex};
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

/// Maximum number of concurrent queries. It exceeds the number of connections, so the limit is reached only by clients
/// that do not wait for their responses.
const QUERIES_MAX: usize = 16;
const QUERY_STACK_BYTES: usize = 256 << 10;
/// How long a thread waits for a further query. Creating a thread with its seccomp filter costs several times as much
/// as most queries, and polling clients send a query every few seconds.
const THREAD_KEPT: Duration = Duration::from_secs(5);
/// How long a pause of reporting waits for the guest's confirmation. A responsive guest completes its batches within
/// milliseconds. A guest that takes longer is stuck; its reports are completed without discarding.
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
    threads: Arc<QueryThreads>,
}

impl Queries {
    pub(super) fn new(view: Arc<PublishedView>, thread_start: ThreadStart) -> Self {
        Self {
            view,
            threads: Arc::new(QueryThreads {
                thread_start,
                queue: Mutex::default(),
                queued: Condvar::new(),
            }),
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

    /// Queries the machine on a separate thread, because the query may have to wait for a stuck guest.
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
        let observer = Arc::clone(&machine.observer);
        self.threads.run(Query {
            reply,
            answer: Box::new(move || match ask(&*observer) {
                Ok(value) => Answer::json(&value),
                Err(cause) => failure::answer(
                    Status::InternalServerError,
                    QueryError::Observer { endpoint, cause },
                ),
            }),
        });
    }
}

struct Query {
    reply: Reply,
    answer: Box<dyn FnOnce() -> Answer + Send>,
}

/// Threads that answer queries, started as needed. An idle thread ends after [`THREAD_KEPT`].
struct QueryThreads {
    thread_start: ThreadStart,
    queue: Mutex<Queue>,
    queued: Condvar,
}

#[derive(Default)]
struct Queue {
    /// Queries that no thread has taken yet; at most as many as there are idle or starting threads.
    waiting: VecDeque<Query>,
    /// Queries that are not answered yet, at most [`QUERIES_MAX`].
    under_way: usize,
    /// Threads that wait for a query, or are about to.
    idle: usize,
}

impl QueryThreads {
    fn run(self: &Arc<Self>, query: Query) {
        let mut queue = self.queue.lock().unpoisoned();
        if queue.under_way == QUERIES_MAX {
            drop(queue);
            let busy = failure::answer(Status::ServiceUnavailable, QueryError::TooMany);
            query.reply.send(busy);
            return;
        }
        queue.under_way += 1;
        queue.waiting.push_back(query);
        if queue.idle >= queue.waiting.len() {
            self.queued.notify_one();
            return;
        }
        let threads = Arc::clone(self);
        let spawned = std::thread::Builder::new()
            .name(QUERY_THREAD.to_owned())
            .stack_size(QUERY_STACK_BYTES)
            .spawn(move || {
                (threads.thread_start)(ThreadKind::ApiQuery);
                threads.serve();
            });
        if let Err(error) = spawned {
            queue.under_way -= 1;
            // The query is still queued: a thread needs this lock to take it.
            let query = queue.waiting.pop_back();
            drop(queue);
            let answer = failure::answer(Status::InternalServerError, QueryError::Thread(error));
            if let Some(query) = query {
                query.reply.send(answer);
            }
        }
    }

    fn serve(&self) {
        self.queue.lock().unpoisoned().idle += 1;
        while let Some(Query { reply, answer }) = self.next() {
            let answer = answer();
            let mut queue = self.queue.lock().unpoisoned();
            queue.under_way -= 1;
            // Before the response, after which the client can send another query.
            queue.idle += 1;
            drop(queue);
            reply.send(answer);
        }
    }

    /// The next query; `None` if none arrived within [`THREAD_KEPT`].
    fn next(&self) -> Option<Query> {
        let queue = self.queue.lock().unpoisoned();
        let (mut queue, _) = self
            .queued
            .wait_timeout_while(queue, THREAD_KEPT, |queue| queue.waiting.is_empty())
            .unpoisoned();
        queue.idle -= 1;
        queue.waiting.pop_front()
    }
}
