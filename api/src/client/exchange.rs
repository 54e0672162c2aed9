//! Sends one request and reads its response.

use std::io::{self, Read, Write};
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::deadline::Deadline;
use super::error::ClientError;
use super::response::{Response, ResponseReader};
use crate::Method;

/// Bytes per read. Most responses fit. The buffer is on the stack, and a program that queries hundreds of VMMs has one
/// thread for each.
const READ_BYTES: usize = 4 << 10;

/// One request.
pub(super) struct Request<'a> {
    pub(super) method: Method,
    pub(super) path: &'a str,
    pub(super) body: Option<&'a str>,
    pub(super) fds: &'a [RawFd],
}

impl Request<'_> {
    /// The bytes on the wire, sent as one piece, so that the server need not reassemble them.
    fn to_bytes(&self) -> Vec<u8> {
        let mut text = format!(
            "{} {} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n",
            self.method.as_str(),
            self.path
        );
        if let Some(body) = self.body {
            text.push_str(&format!(
                "Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            ));
        } else {
            text.push_str("\r\n");
        }
        text.into_bytes()
    }
}

pub(super) fn exchange(
    stream: &UnixStream,
    request: &Request<'_>,
    deadline: Option<Deadline>,
) -> Result<Response, ClientError> {
    let sent = send(stream, request, deadline);
    match sent {
        Ok(()) => receive(stream, deadline),
        // A server that rejects a body before reading it in full responds and closes. The response is more informative
        // than the broken pipe.
        Err(ClientError::Send { source }) => {
            receive(stream, deadline).map_err(|_| ClientError::Send { source })
        }
        Err(error) => Err(error),
    }
}

fn send(
    mut stream: &UnixStream,
    request: &Request<'_>,
    deadline: Option<Deadline>,
) -> Result<(), ClientError> {
    let bytes = request.to_bytes();
    let mut rest = bytes.as_slice();
    if !request.fds.is_empty() {
        stream
            .set_write_timeout(deadline.map(Deadline::remaining).transpose()?)
            .map_err(|source| ClientError::Send { source })?;
        let count = stream
            .send_with_fds(&[rest], request.fds)
            .map_err(|errno| send_failed(io::Error::from_raw_os_error(errno.errno()), deadline))?;
        rest = &rest[count..];
    }
    while !rest.is_empty() {
        stream
            .set_write_timeout(deadline.map(Deadline::remaining).transpose()?)
            .map_err(|source| ClientError::Send { source })?;
        match stream.write(rest) {
            Ok(count) => rest = &rest[count..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(send_failed(error, deadline)),
        }
    }
    Ok(())
}

fn send_failed(source: io::Error, deadline: Option<Deadline>) -> ClientError {
    match (source.kind(), deadline) {
        (io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut, Some(deadline)) => deadline.missed(),
        _ => ClientError::Send { source },
    }
}

fn receive(mut stream: &UnixStream, deadline: Option<Deadline>) -> Result<Response, ClientError> {
    let mut reader = ResponseReader::default();
    let mut buffer = [0; READ_BYTES];
    loop {
        if let Some(response) = reader.response().map_err(ClientError::Response)? {
            return Ok(response);
        }
        stream
            .set_read_timeout(deadline.map(Deadline::remaining).transpose()?)
            .map_err(|source| ClientError::Receive { source })?;
        match stream.read(&mut buffer) {
            Ok(0) => return Err(ClientError::Response(reader.closed())),
            Ok(count) => reader.push(&buffer[..count]),
            Err(error) => match (error.kind(), deadline) {
                (io::ErrorKind::Interrupted, _) => {}
                (io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut, Some(deadline)) => {
                    return Err(deadline.missed());
                }
                _ => return Err(ClientError::Receive { source: error }),
            },
        }
    }
}
