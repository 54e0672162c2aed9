//! Tests connections between programs of the host and a guest without an operating system.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;

use anyhow::{Result, ensure};
use integration_tests::bare_metal::{SCENARIO_DEADLINE, expect_all_passed, kvm_opens, start};

/// Responds to the guest on the port to which it connects, then connects to the guest's port.
fn converse(listener: &UnixListener, socket: &Path) -> Result<()> {
    let (mut stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(SCENARIO_DEADLINE))?;
    let mut text = [0; 4];
    stream.read_exact(&mut text)?;
    ensure!(&text == b"ping", "{text:?}");
    stream.write_all(b"pong")?;
    ensure!(stream.read(&mut text)? == 0, "the guest did not end");

    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(SCENARIO_DEADLINE))?;
    stream.write_all(b"CONNECT 52\n")?;
    let mut answer = BufReader::new(stream);
    let mut line = String::new();
    answer.read_line(&mut line)?;
    ensure!(line == "OK 1073741824\n", "{line:?}");
    let mut text = [0; 5];
    answer.read_exact(&mut text)?;
    ensure!(&text == b"hello", "{text:?}");
    Ok(())
}

#[test]
fn vsock_connects_programs_of_host_and_guest_both_ways() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("vsock");
    let listener = UnixListener::bind(folder.path().join("vsock_1024"))?;
    let option = format!("cid=3,socket={}", socket.display());
    let mut vmm = start("vsock", &["--vsock", &option])?;
    let conversation = thread::spawn({
        let socket = socket.clone();
        move || converse(&listener, &socket)
    });
    expect_all_passed(&mut vmm)?;
    conversation.join().expect("the thread does not panic")?;
    vmm.expect_clean_exit(SCENARIO_DEADLINE)?;
    ensure!(!socket.exists(), "the socket was left behind");
    Ok(())
}
