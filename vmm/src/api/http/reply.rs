//! Answers, and the way they come back to the HTTP thread from wherever they were made.

use std::sync::{Arc, Mutex, PoisonError};

use api::ErrorBody;
use micro_http::{Body, Response, StatusCode, Version};
use serde::Serialize;
use vmm_sys_util::eventfd::EventFd;

/// Value of the `Server` header, upstream's.
const SERVER_NAME: &str = "Cloud Hypervisor API";

/// What a request is answered with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The status.
    pub status: StatusCode,
    /// JSON in ASCII; no body and no `Content-Length` when absent.
    pub body: Option<String>,
}

impl Answer {
    /// 204.
    pub fn no_content() -> Self {
        Self::empty(StatusCode::NoContent)
    }

    /// `status` without a body.
    pub fn empty(status: StatusCode) -> Self {
        Self { status, body: None }
    }

    /// 200 with `value` as JSON.
    pub fn json<T: Serialize + ?Sized>(value: &T) -> Self {
        Self::with_body(StatusCode::OK, value)
    }

    /// An error with its chain of causes.
    pub fn error(status: StatusCode, chain: &ErrorBody) -> Self {
        Self::with_body(status, chain)
    }

    /// What the HTTP layer itself has to complain about: an object, where the API sends an array, as upstream does.
    pub(super) fn refusal(status: StatusCode, text: &str) -> Self {
        Self::with_body(status, &serde_json::json!({ "error": text }))
    }

    fn with_body<T: Serialize + ?Sized>(status: StatusCode, value: &T) -> Self {
        match api::to_ascii_json(value) {
            Ok(body) => Self {
                status,
                body: Some(body),
            },
            Err(error) => {
                log::error!("An answer cannot be written as JSON: {error}");
                Self::empty(StatusCode::InternalServerError)
            }
        }
    }

    /// The bytes on the wire: no reason phrase and `Content-Length` in exactly this case, which upstream's client
    /// depends on.
    pub(super) fn to_bytes(&self, version: Version) -> Vec<u8> {
        let mut response = Response::new(version, self.status);
        response.set_server(SERVER_NAME);
        if let Some(body) = &self.body {
            response.set_body(Body::new(body.as_str()));
        }
        let mut bytes = Vec::new();
        response
            .write_all(&mut bytes)
            .expect("writing to a vector does not fail");
        bytes
    }
}

/// The right, and the duty, to answer one request. May be sent to another thread. Dropping it unanswered answers 500,
/// so that no client waits for ever for a request that got lost.
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

    /// Hands the answer to the HTTP thread. Never waits for the client.
    pub fn send(mut self, answer: Answer) {
        self.sent = true;
        self.mailbox.post(self.connection, answer);
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if !self.sent {
            let chain = ErrorBody(vec!["The request was dropped without an answer".to_owned()]);
            let answer = Answer::error(StatusCode::InternalServerError, &chain);
            self.mailbox.post(self.connection, answer);
        }
    }
}

/// Answers on their way to the HTTP thread. Holds at most one for each connection that ever waited, and is emptied at
/// every turn of the loop.
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
        self.answers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push((connection, answer));
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
        // Nothing to read means that another wake-up has already emptied it.
        let _ = self.wake.read();
        std::mem::take(&mut *self.answers.lock().unwrap_or_else(PoisonError::into_inner))
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
    fn reply_dropped_unanswered_answers_500() {
        let mailbox = Arc::new(Mailbox::new().unwrap());
        drop(Reply::new(7, Arc::clone(&mailbox)));
        let answers = mailbox.take();
        assert_eq!(answers.len(), 1);
        assert_eq!(answers[0].0, 7);
        assert_eq!(answers[0].1.status, StatusCode::InternalServerError);
    }
}
