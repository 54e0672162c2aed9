//! Tests each kind of endpoint from the operator's side.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use super::super::input::tests::Device;
use super::super::manager::tests::manager;
use super::*;

fn read_exactly(from: &mut impl Read, count: usize) -> Vec<u8> {
    let mut data = vec![0; count];
    from.read_exact(&mut data).unwrap();
    data
}

fn listen_to(endpoint: &Endpoint) -> Arc<Device> {
    let device = Device::with_room(usize::MAX);
    let weak: Weak<Device> = Arc::downgrade(&device);
    endpoint.set_input_sink(weak);
    device
}

#[test]
fn config_modes_are_understood() {
    let path = Some(Path::new("/x"));
    let from = EndpointMode::from_config;
    assert_eq!(from(ConsoleOutputMode::Off, None, None).unwrap(), None);
    assert_eq!(
        from(ConsoleOutputMode::File, path, None).unwrap(),
        Some(EndpointMode::File("/x".into()))
    );
    assert_eq!(
        from(ConsoleOutputMode::Socket, None, path).unwrap(),
        Some(EndpointMode::Socket("/x".into()))
    );
    assert!(matches!(
        from(ConsoleOutputMode::File, None, path),
        Err(SerialError::MissingPath { mode: "File" })
    ));
}

#[test]
fn file_is_emptied_and_written_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("log");
    std::fs::write(&path, "old text").unwrap();
    let endpoint = Endpoint::open(&EndpointMode::File(path.clone()), &manager()).unwrap();
    endpoint.output().write_all(b"new").unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"new");
}

#[test]
fn file_that_cannot_be_made_is_an_error_with_its_path() {
    let mode = EndpointMode::File("/nonexistent/log".into());
    let error = Endpoint::open(&mode, &manager()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "Cannot open console file /nonexistent/log"
    );
}

#[test]
fn pty_passes_bytes_unchanged_both_ways() {
    let manager = manager();
    let endpoint = Endpoint::open(&EndpointMode::Pty, &manager).unwrap();
    let device = listen_to(&endpoint);
    let mut operator = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOCTTY)
        .open(endpoint.pty_path().unwrap())
        .unwrap();
    endpoint.output().write_all(b"login\r\n").unwrap();
    assert_eq!(read_exactly(&mut operator, 7), b"login\r\n");
    operator.write_all(b"root\r\x03\x04").unwrap();
    device.wait_for(b"root\r\x03\x04");
}

#[test]
fn pty_outlives_an_operator() {
    let manager = manager();
    let endpoint = Endpoint::open(&EndpointMode::Pty, &manager).unwrap();
    let device = listen_to(&endpoint);
    for sent in [b"a", b"b"] {
        let mut operator = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOCTTY)
            .open(endpoint.pty_path().unwrap())
            .unwrap();
        operator.write_all(sent).unwrap();
        let all = if sent == b"a" { &b"a"[..] } else { b"ab" };
        device.wait_for(all);
    }
}

#[test]
fn socket_serves_the_latest_client_and_keeps_what_nobody_read() {
    let manager = manager();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("console");
    let endpoint = Endpoint::open(&EndpointMode::Socket(path.clone()), &manager).unwrap();
    let device = listen_to(&endpoint);
    endpoint.output().write_all(b"early").unwrap();

    let mut first = UnixStream::connect(&path).unwrap();
    assert_eq!(read_exactly(&mut first, 5), b"early");
    first.write_all(b"hello").unwrap();
    device.wait_for(b"hello");

    let mut second = UnixStream::connect(&path).unwrap();
    assert_eq!(first.read(&mut [0]).unwrap(), 0);
    second.write_all(b"!").unwrap();
    device.wait_for(b"hello!");
    endpoint.output().write_all(b"to you").unwrap();
    assert_eq!(read_exactly(&mut second, 6), b"to you");

    drop(second);
    let mut third = UnixStream::connect(&path).unwrap();
    third.write_all(b"?").unwrap();
    device.wait_for(b"hello!?");
    endpoint.output().write_all(b"last").unwrap();
    assert_eq!(read_exactly(&mut third, 4), b"last");

    drop(endpoint);
    assert!(!path.exists());
}

#[test]
fn socket_that_exists_is_an_error_and_stays() {
    let manager = manager();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("console");
    let mode = EndpointMode::Socket(path.clone());
    let first = Endpoint::open(&mode, &manager).unwrap();
    assert!(matches!(
        Endpoint::open(&mode, &manager),
        Err(SerialError::Socket { .. })
    ));
    assert!(path.exists());
    drop(first);
}

#[test]
fn null_endpoint_has_no_input_and_needs_no_thread() {
    let endpoint = Endpoint::open(&EndpointMode::Null, &manager()).unwrap();
    endpoint.output().write_all(b"x").unwrap();
    endpoint.resume_input();
    endpoint.console().unwrap();
}

#[test]
fn fifo_without_a_reader_is_written_without_blocking() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("fifo");
    let status = std::process::Command::new("mkfifo")
        .arg(&path)
        .status()
        .unwrap();
    assert!(status.success());
    let manager = manager();
    let endpoint = Endpoint::open(&EndpointMode::File(path.clone()), &manager).unwrap();
    endpoint.output().write_all(b"kept").unwrap();
    let mut reader = File::open(&path).unwrap();
    assert_eq!(read_exactly(&mut reader, 4), b"kept");
}

#[test]
fn terminal_of_which_another_has_the_input_is_written_and_not_read() {
    let manager = manager();
    let endpoint = Endpoint::open(&EndpointMode::TtyOutput, &manager).unwrap();
    assert!(endpoint.input.is_none());
    assert!(endpoint._raw_mode.is_none());
}
