//! Measures the latency of the API: idle, with many clients, with a guest that uses its disk, and while a client waits
//! for a silent guest.

use std::io::{self, ErrorKind};
use std::path::Path;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use integration_tests::linux::Machine;
use integration_tests::literal_client::{Answer, request};
use serde_json::{Map, Value, json};

use crate::cases::Cases;
use crate::subject::Subject;
use integration_tests::overhead::disk_image;

/// Number of requests for a latency distribution, by all clients together.
const REQUESTS: usize = 400;
/// Number of concurrent clients.
const CLIENTS: usize = 8;
/// Number of refusals after which a client gives up.
const REFUSED_MAX: usize = 10_000;
/// The endpoints; a VMM without the last one returns an error, and is not measured with it.
const ENDPOINTS: [&str; 3] = ["vm.info", "vm.counters", "vm.reclaim-stats"];

/// Writes and reads a disk until it is killed.
const DISK_WORK: &str = "(while true; do dd if=/dev/zero of=/dev/vda bs=1M count=32 oflag=direct; \
                         dd if=/dev/vda of=/dev/null bs=1M count=32 iflag=direct; done) \
                         > /dev/null 2>&1 & echo $! > /tmp/disk-work";

/// All cases with a guest of one VMM.
pub(crate) fn measure(subject: &Subject) -> Result<Value> {
    let (_folder, disk) = disk_image()?;
    let boot = || {
        Machine {
            vmm: Some(&subject.program),
            arguments: &[
                "--balloon",
                "size=0,free_page_reporting=on",
                "--disk",
                &disk,
            ],
            ..Machine::default()
        }
        .serve()
    };
    let mut cases = Cases::new("api", subject, &boot);
    cases.run("one_client", |guest| endpoints(&guest.vmm.socket(), 1))?;
    cases.run("eight_clients", |guest| {
        endpoints(&guest.vmm.socket(), CLIENTS)
    })?;
    cases.run("guest_uses_disk", |guest| {
        guest.shell(DISK_WORK)?;
        let figures = endpoints(&guest.vmm.socket(), 1)?;
        guest.shell("kill $(cat /tmp/disk-work)")?;
        Ok(figures)
    })?;
    cases.run("guest_is_paused_and_asked", |guest| {
        guest.vmm.put("vm.pause", None)?;
        while_asked(&guest.vmm.socket())
    })?;
    cases.finish()
}

/// Measures each endpoint in turn, with this number of concurrent clients.
fn endpoints(socket: &Path, clients: usize) -> Result<Value> {
    let mut figures = Map::new();
    for endpoint in ENDPOINTS {
        let known = request(socket, "GET", endpoint, None)?.status == 200;
        ensure!(known || endpoint != ENDPOINTS[0], "{endpoint} fails");
        if known {
            let asked = ask(socket, endpoint, clients)?;
            figures.insert(format!("{endpoint}_us"), asked.distribution());
        }
    }
    Ok(figures.into())
}

/// The results of clients.
#[derive(Debug, Default)]
struct Asked {
    times_us: Vec<u64>,
    /// Refusals because of too many connections; the request was repeated.
    refused: usize,
}

impl Asked {
    fn add(&mut self, other: Self) {
        self.times_us.extend(other.times_us);
        self.refused += other.refused;
    }

    fn distribution(mut self) -> Value {
        self.times_us.sort_unstable();
        let times_us = &self.times_us;
        let at = |percent: usize| times_us.get(times_us.len() * percent / 100);
        json!({
            "p50": at(50),
            "p99": at(99),
            "max": times_us.last(),
            "refused": self.refused,
        })
    }
}

fn ask(socket: &Path, endpoint: &str, clients: usize) -> Result<Asked> {
    thread::scope(|scope| {
        let clients: Vec<_> = (0..clients)
            .map(|_| scope.spawn(|| client(socket, endpoint, REQUESTS / clients)))
            .collect();
        let mut all = Asked::default();
        for client in clients {
            match client.join() {
                Ok(asked) => all.add(asked.context(endpoint.to_owned())?),
                Err(_) => bail!("a client panicked"),
            }
        }
        Ok(all)
    })
}

/// Sends one request after another, each on a separate connection.
fn client(socket: &Path, endpoint: &str, requests: usize) -> Result<Asked> {
    let mut asked = Asked::default();
    for _ in 0..requests {
        let begin = Instant::now();
        loop {
            let answer = request(socket, "GET", endpoint, None);
            match &answer {
                Ok(answer) if answer.status == 200 => break,
                _ if is_refusal(&answer) && asked.refused < REFUSED_MAX => asked.refused += 1,
                _ => bail!("{answer:?}, after {} refusals", asked.refused),
            }
        }
        asked.times_us.push(begin.elapsed().as_micros() as u64);
    }
    Ok(asked)
}

/// Whether there were too many connections: the VMM reported this, or closed the connection before the request was
/// sent.
fn is_refusal(answer: &Result<Answer>) -> bool {
    match answer {
        Ok(answer) => answer.status == 503,
        Err(error) => matches!(
            error.downcast_ref().map(io::Error::kind),
            Some(ErrorKind::BrokenPipe | ErrorKind::ConnectionReset)
        ),
    }
}

/// Measures `vm.info` while a client waits for the statistics of a paused guest, which never arrive.
fn while_asked(socket: &Path) -> Result<Value> {
    thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            let begin = Instant::now();
            // The response is an error, because the guest is paused. Only the wait matters.
            let answer = request(socket, "GET", "vm.balloon-stats", None);
            (answer.is_ok(), begin.elapsed())
        });
        let asked = client(socket, ENDPOINTS[0], REQUESTS)?;
        let Ok((answered, waited)) = waiting.join() else {
            bail!("the waiting thread panicked");
        };
        ensure!(answered, "vm.balloon-stats got no answer");
        Ok(json!({
            "vm.info_us": asked.distribution(),
            "vm.balloon-stats_answered_after_ms": waited.as_millis() as u64,
        }))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distribution_of_a_hundred_has_its_quantiles() {
        let asked = Asked {
            times_us: (1..=100).rev().collect(),
            refused: 2,
        };
        let figures = json!({ "p50": 51, "p99": 100, "max": 100, "refused": 2 });
        assert_eq!(asked.distribution(), figures);
    }
}
