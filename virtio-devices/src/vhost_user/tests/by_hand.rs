//! A back end that implements the protocol without touching a ring, so that a test sees every message.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::super::RING_FEATURES;
use crate::testing::DEADLINE;

pub(super) const GET_FEATURES: u32 = 1;
pub(super) const SET_VRING_BASE: u32 = 10;
pub(super) const GET_VRING_BASE: u32 = 11;
pub(super) const SET_VRING_KICK: u32 = 12;
pub(super) const GET_PROTOCOL_FEATURES: u32 = 15;
pub(super) const GET_QUEUE_NUM: u32 = 17;
pub(super) const SET_VRING_ENABLE: u32 = 18;
pub(super) const GET_CONFIG: u32 = 24;
pub(super) const GET_INFLIGHT_FD: u32 = 31;
pub(super) const SET_INFLIGHT_FD: u32 = 32;
pub(super) const PROTOCOL_FEATURES: u64 = 1 << 30;
pub(super) const MQ: u64 = 1 << 0;
pub(super) const CONFIG: u64 = 1 << 9;
pub(super) const INFLIGHT_SHMFD: u64 = 1 << 12;
/// Version 1, a reply.
const REPLY: u32 = 1 | 1 << 2;
const HEADER_BYTES: usize = 12;

/// A message of the front end.
pub(super) struct Message {
    pub(super) request: u32,
    pub(super) body: Vec<u8>,
    pub(super) file: Option<File>,
}

/// One connection.
pub(super) struct ByHand(UnixStream);

impl ByHand {
    /// Listens immediately, and accepts one connection per call.
    pub(super) fn listen(path: &Path) -> impl FnMut() -> Self + use<> {
        let listener = UnixListener::bind(path).unwrap();
        move || {
            let (stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(DEADLINE)).unwrap();
            Self(stream)
        }
    }

    /// `None` at the end of the connection.
    pub(super) fn read(&mut self) -> Option<Message> {
        let mut header = [0; HEADER_BYTES];
        let (count, file) = self.0.recv_with_fd(&mut header).ok()?;
        if count < HEADER_BYTES {
            return None;
        }
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
        let mut body = vec![0; word(8) as usize];
        std::io::Read::read_exact(&mut self.0, &mut body).ok()?;
        Some(Message {
            request: word(0),
            body,
            file,
        })
    }

    pub(super) fn reply(&mut self, request: u32, body: &[u8], file: Option<&File>) {
        let words = [request, REPLY, body.len() as u32].map(u32::to_le_bytes);
        let bytes = [words.as_flattened(), body].concat();
        match file {
            Some(file) => self.0.send_with_fd(&bytes[..], file.as_raw_fd()).map(drop),
            None => std::io::Write::write_all(&mut self.0, &bytes).map_err(Into::into),
        }
        // The front end may have given up.
        .ok();
    }

    /// Answers messages properly until `end` has come, and returns all. `record`: the file for requests in flight.
    pub(super) fn serve(&mut self, config: &[u8], record: &File, end: u32) -> Vec<Message> {
        let mut messages = Vec::new();
        while let Some(message) = self.read() {
            let number = |value: u64| value.to_le_bytes().to_vec();
            let (answer, file) = match message.request {
                GET_FEATURES => (number(RING_FEATURES | PROTOCOL_FEATURES), None),
                GET_PROTOCOL_FEATURES => (number(MQ | CONFIG | INFLIGHT_SHMFD), None),
                GET_QUEUE_NUM => (number(8), None),
                GET_VRING_BASE => (message.body.clone(), None),
                GET_CONFIG => ([&message.body[..HEADER_BYTES], config].concat(), None),
                GET_INFLIGHT_FD => {
                    // Size and offset, then what was asked for.
                    let size = number(record.metadata().unwrap().len());
                    let body = [&size, &number(0), &message.body[16..]].concat();
                    (body, Some(record))
                }
                _ => (Vec::new(), None),
            };
            if !answer.is_empty() {
                self.reply(message.request, &answer, file);
            }
            let request = message.request;
            messages.push(message);
            if request == end {
                break;
            }
        }
        messages
    }
}
