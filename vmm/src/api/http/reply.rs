//! Responses, and their way back to the HTTP thread.

use std::sync::{Arc, Mutex};

use api::ErrorBody;
use micro_http::{Body, Response, StatusCode, Version};
use serde::Serialize;
use virtio_devices::Unpoisoned;
use vmm_sys_util::eventfd::EventFd;

/// Value of the `Server` header, the same as upstream's.
const SERVER_NAME: &str = "Cloud Hypervisor API";

/// The status codes of the API. `micro_http` has no name for some of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Status {
    /// The head is fine; send the body.
    Continue = 100,
    /// Success, usually with a body.
    Ok = 200,
    /// Success without a body.
    NoContent = 204,
    /// The request is invalid.
    BadRequest = 400,
    /// No such path, VM or device.
    NotFound = 404,
    /// An identifier or an image is in use already.
    Conflict = 409,
    /// Something is pending: the same request may succeed later.
    TooManyRequests = 429,
    /// Everything else.
    InternalServerError = 500,
    /// Too many clients or requests.
    ServiceUnavailable = 503,
}

/// The response to a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The status.
    pub status: Status,
    /// JSON in ASCII. If `None`, the response has neither body nor `Content-Length`.
    pub body: Option<String>,
}

impl Answer {
    /// 204.
    pub fn no_content() -> Self {
        Self::empty(Status::NoContent)
    }

    /// `status` without a body.
    pub fn empty(status: Status) -> Self {
        Self { status, body: None }
    }

    /// 200 with `value` as JSON.
    pub fn json<T: Serialize + ?Sized>(value: &T) -> Self {
        Self::with_body(Status::Ok, value)
    }

    /// An error with its chain of causes.
    pub fn error(status: Status, chain: &ErrorBody) -> Self {
        Self::with_body(status, chain)
    }

    /// An error from the HTTP layer itself. Its body is an object, whereas the API's errors are arrays, as in upstream.
    pub(super) fn refusal(status: Status, text: &str) -> Self {
        Self::with_body(status, &serde_json::json!({ "error": text }))
    }

    fn with_body<T: Serialize + ?Sized>(status: Status, value: &T) -> Self {
        match api::to_ascii_json(value) {
            Ok(body) => Self {
                status,
                body: Some(body),
            },
            Err(error) => {
                log::error!("Cannot write a response as JSON: {error}");
                Self::empty(Status::InternalServerError)
            }
        }
    }

    /// The bytes on the wire: no reason phrase, and `Content-Length` in exactly this capitalisation, which upstream's
    /// client depends on.
    pub(super) fn to_bytes(&self, version: Version) -> Vec<u8> {
        let version_text = match version {
            Version::Http10 => "HTTP/1.0",
            Version::Http11 => "HTTP/1.1",
        };
        let mut bytes = format!("{version_text} {} \r\n", self.status as u16).into_bytes();
        // `micro_http` formats headers and body. Its status line is dropped, because it lacks some codes.
        let mut response = Response::new(version, StatusCode::OK);
        response.set_server(SERVER_NAME);
        if let Some(body) = &self.body {
            response.set_body(Body::new(body.as_str()));
        }
        let mut written = Vec::new();
        response
            .write_all(&mut written)
            .expect("writing to a vector does not fail");
        let status_line = written.iter().position(|byte| *byte == b'\n');
        bytes.extend_from_slice(&written[status_line.map_or(0, |end| end + 1)..]);
        bytes
    }
}

/// The obligation to respond to one request. It may be sent to another thread. Dropping it without a response sends
/// 500, so that no client waits forever for a lost request.
#[derive(Debug)]
pub struct Reply {
    connection: u64,
    mailbox: Arc<Mailbox>,
    sent: bool,
}

impl Reply {
    pub(super) fn new(connection: u64, mailbox: Arc<Mailbox>) -> Self {
        Self {
            connection,
            mailbox,
            sent: false,
        }
    }

    /// Hands the response to the HTTP thread. Does not wait for the client.
    pub fn send(mut self, answer: Answer) {
        self.sent = true;
        self.mailbox.post(self.connection, answer);
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if !self.sent {
            let chain = ErrorBody(vec!["The request was dropped without an answer".to_owned()]);
            let answer = Answer::error(Status::InternalServerError, &chain);
            self.mailbox.post(self.connection, answer);
        }
    }
}

/// Responses on their way to the HTTP thread. The queue holds at most one for each connection that ever waited, and is
/// emptied in every iteration of the loop.
#[derive(Debug)]
pub(super) struct Mailbox {
    answers: Mutex<Vec<(u64, Answer)>>,
    wake: EventFd,
}

impl Mailbox {
    pub(super) fn new() -> std::io::Result<Self> {
        Ok(Self {
            answers: Mutex::default(),
            wake: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
        })
    }

    fn post(&self, connection: u64, answer: Answer) {
        self.answers.lock().unpoisoned().push((connection, answer));
        self.wake_up();
    }

    pub(super) fn wake_up(&self) {
        // The counter can only be full when a wake-up is already pending, so a failure changes nothing.
        let _ = self.wake.write(1);
    }

    pub(super) fn wake_fd(&self) -> &EventFd {
        &self.wake
    }

    pub(super) fn take(&self) -> Vec<(u64, Answer)> {
        // If there is nothing to read, another wake-up has already cleared it.
        let _ = self.wake.read();
        std::mem::take(&mut *self.answers.lock().unpoisoned())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn answer_bytes_follow_upstreams_client() {
        let bytes = Answer::json(&["\u{e9}"]).to_bytes(Version::Http11);
        assert_eq!(
            String::from_utf8(bytes).unwrap(),
            "HTTP/1.1 200 \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n\
             Content-Type: application/json\r\nContent-Length: 10\r\n\r\n[\"\\u00e9\"]"
        );
        let bytes = Answer::no_content().to_bytes(Version::Http11);
        assert_eq!(
            String::from_utf8(bytes).unwrap(),
            "HTTP/1.1 204 \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n\r\n"
        );
    }

    #[test]
    fn answer_has_the_status_codes_that_the_crate_lacks() {
        for (status, line) in [
            (Status::Conflict, "HTTP/1.0 409 \r\nServer: "),
            (Status::TooManyRequests, "HTTP/1.0 429 \r\nServer: "),
        ] {
            let bytes = Answer::refusal(status, "x").to_bytes(Version::Http10);
            let text = String::from_utf8(bytes).unwrap();
            assert!(text.starts_with(line), "{text}");
            assert!(
                text.ends_with("Content-Length: 13\r\n\r\n{\"error\":\"x\"}"),
                "{text}"
            );
        }
    }

    #[test]
    fn reply_dropped_unanswered_answers_500() {
        let mailbox = Arc::new(Mailbox::new().unwrap());
        drop(Reply::new(7, Arc::clone(&mailbox)));
        let answers = mailbox.take();
        assert_eq!(answers.len(), 1);
        assert_eq!(answers[0].0, 7);
        assert_eq!(answers[0].1.status, Status::InternalServerError);
    }
}
