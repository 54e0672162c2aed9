//! Moves a VM between two processes, over connections that may break.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::bare_metal::SCENARIO_DEADLINE;
use crate::vmm::{PROCESS_DEADLINE, Vmm};
use crate::wait::wait_for;

/// Arguments by which a VMM writes events to a file, for [`wait_event`].
pub const EVENTS: &[&str] = &["--event-monitor", "path=@/events"];

/// Waits for an event and returns its properties.
///
/// # Errors
/// It does not come, or is not JSON.
pub fn wait_event(vmm: &Vmm, name: &str) -> Result<Value> {
    wait_event_after(vmm, name, 0)
}

/// The same if the VMM has sent `earlier` events of this name before.
fn wait_event_after(vmm: &Vmm, name: &str, earlier: usize) -> Result<Value> {
    wait_for(name, SCENARIO_DEADLINE, || {
        let event = events(vmm, name).into_iter().nth(earlier);
        Ok(event.map(|event| serde_json::from_str::<Value>(&event)))
    })?
    .map(|event| event["properties"].clone())
    .context("an event that is JSON")
}

/// The events of this name so far.
fn events(vmm: &Vmm, name: &str) -> Vec<String> {
    let quoted = format!(r#""event": "{name}""#);
    let text = vmm.text("events");
    let events = text.split("\n\n").filter(|event| {
        let event = event.replace(r#""event":""#, r#""event": ""#);
        event.contains(&quoted)
    });
    events.map(str::to_owned).collect()
}

/// Calls `act` while `target` waits for a VM at `url`; returns the status of the response to that.
///
/// # Errors
/// The target does not wait, or `act` failed.
///
/// # Panics
/// Never: the thread that waits for the response does not panic.
pub fn while_receiving(
    target: &Vmm,
    url: &str,
    act: impl FnOnce() -> Result<()>,
) -> Result<(u16, String)> {
    while_receiving_with(target, url, &json!({}), act)
}

/// The same with further settings of the target.
///
/// # Errors
/// As [`while_receiving`].
///
/// # Panics
/// As [`while_receiving`].
pub fn while_receiving_with(
    target: &Vmm,
    url: &str,
    settings: &Value,
    act: impl FnOnce() -> Result<()>,
) -> Result<(u16, String)> {
    const READY: &str = "migration-receive-ready";
    let mut body = settings.clone();
    body["receiver_url"] = url.into();
    let body = body.to_string();
    let earlier = events(target, READY).len();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| target.request("PUT", "vm.receive-migration", Some(&body)));
        let acted = wait_event_after(target, READY, earlier).and_then(|_| act());
        if acted.is_err() {
            // Ends the wait.
            target.put("vm.cancel-migration", None).ok();
        }
        let answer = waiting.join().expect("no panic")?;
        acted?;
        Ok((answer.status, answer.body.unwrap_or_default()))
    })
}

/// Begins to move the VM to this address.
///
/// # Errors
/// The request was not accepted.
pub fn send(source: &Vmm, url: &str) -> Result<()> {
    send_with(source, url, &json!({}))
}

/// The same with further settings.
///
/// # Errors
/// The request was not accepted.
pub fn send_with(source: &Vmm, url: &str, settings: &Value) -> Result<()> {
    let mut body = settings.clone();
    body["destination_url"] = url.into();
    let body = body.to_string();
    source.put("vm.send-migration", Some(&body)).map(drop)
}

/// An unused TCP port.
///
/// # Errors
/// There is none.
pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// Forwards a connection to `port` until `bytes` bytes have gone to the target; then calls `cut` and closes it.
pub fn forward_until(
    port: u16,
    bytes: usize,
    cut: impl FnOnce() + Send,
) -> impl FnOnce(TcpStream) -> Result<()> + Send {
    move |source| {
        let target = TcpStream::connect(("127.0.0.1", port))?;
        let (mut from, mut to) = (&source, &target);
        std::thread::scope(|scope| {
            scope.spawn(|| std::io::copy(&mut &target, &mut &source).ok());
            let mut buffer = vec![0; 64 << 10];
            let mut left = bytes;
            while left > 0 {
                let wanted = buffer.len().min(left);
                match from.read(&mut buffer[..wanted]) {
                    Ok(count) if count > 0 && to.write_all(&buffer[..count]).is_ok() => {
                        left -= count;
                    }
                    _ => break,
                }
            }
            cut();
            source.shutdown(Shutdown::Both).ok();
            target.shutdown(Shutdown::Both).ok();
        });
        Ok(())
    }
}

/// Moves the VM to another process over a connection that breaks after `bytes` bytes, which must be less than its data.
/// Returns when the VM is here again.
///
/// # Errors
/// The migration cannot be started or does not end.
pub fn move_in_vain(source: &Vmm, bytes: usize) -> Result<()> {
    let target = Vmm::start(EVENTS)?;
    let port = free_port()?;
    let proxy = TcpListener::bind("127.0.0.1:0")?;
    proxy.set_nonblocking(true)?;
    let url = json!({"destination_url": format!("tcp:{}", proxy.local_addr()?)}).to_string();
    let (status, body) = while_receiving(&target, &format!("tcp:127.0.0.1:{port}"), || {
        // A client of the source may be about to make it possible again.
        wait_for("the start of a migration", PROCESS_DEADLINE, || {
            let answer = source.request("PUT", "vm.send-migration", Some(&url))?;
            Ok(matches!(answer.status, 200 | 204).then_some(()))
        })?;
        let connection = wait_for("the source", PROCESS_DEADLINE, || Ok(proxy.accept().ok()))?;
        forward_until(port, bytes, || ())(connection.0)
    })?;
    ensure!(status == 500, "the target received the VM: {status} {body}");
    wait_for("the end on the source", SCENARIO_DEADLINE, || {
        let info = source.get("vm.info")?;
        Ok(info.get("migration_progress").is_none().then_some(()))
    })
}
