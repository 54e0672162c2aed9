//! Tests with back ends that respond incorrectly, late or never.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc;

use super::back_end::BackEnd;
use super::{QUEUES, Rig};
use crate::pci::PciFunction;
use crate::testing::DEADLINE;

const REPLY: u32 = 1 | 1 << 2;

fn read_request(stream: &mut UnixStream) -> Option<u32> {
    let mut header = [0; 12];
    stream.read_exact(&mut header).ok()?;
    let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
    let mut body = vec![0; word(8) as usize];
    stream.read_exact(&mut body).ok()?;
    Some(word(0))
}

fn reply(stream: &mut UnixStream, request: u32, body: &[u8]) -> bool {
    let mut bytes = Vec::new();
    for word in [request, REPLY, body.len() as u32] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(body);
    stream.write_all(&bytes).is_ok()
}

/// Responds to the requests of one connection with `answer`, until it returns false.
fn with_liar(rig: &Rig, answer: impl FnOnce(UnixStream) + Send + 'static) {
    let listener = UnixListener::bind(rig.socket()).unwrap();
    std::thread::spawn(move || {
        if let Ok((stream, _)) = listener.accept() {
            drop(listener);
            answer(stream);
        }
    });
}

/// Checks that a well-behaved back end is accepted after a misbehaving one.
fn recovers(rig: &Rig) {
    // Starts only after the misbehaving back end has stopped listening.
    std::fs::remove_file(rig.socket()).ok();
    let back_end = BackEnd::start(&rig.socket(), QUEUES);
    rig.wait_until_served();
    assert!(!rig.driver.needs_reset());
    back_end.kill();
}

#[test]
fn wrong_answers_end_the_connection_and_are_counted() {
    const GET_FEATURES: u32 = 1;
    type Lie = fn(&mut UnixStream);
    let lies: [(&str, Lie); 7] = [
        ("closes at once", |_| {}),
        ("answers another request", |stream| {
            reply(stream, GET_FEATURES + 1, &[0xff; 8]);
        }),
        ("answers too little", |stream| {
            reply(stream, GET_FEATURES, &[0xff; 4]);
        }),
        ("answers too much", |stream| {
            reply(stream, GET_FEATURES, &[0xff; 2000]);
        }),
        ("closes in the header", |stream| {
            stream.write_all(&[1, 0, 0]).unwrap();
        }),
        ("sends no reply but a request", |stream| {
            let header = [1u32, 1, 8].map(u32::to_le_bytes).concat();
            stream.write_all(&header).unwrap();
            stream.write_all(&[0; 8]).unwrap();
        }),
        ("has no features", |stream| {
            reply(stream, GET_FEATURES, &[0; 8]);
            // SET_OWNER has no reply.
            read_request(stream);
            read_request(stream);
        }),
    ];
    for (name, lie) in lies {
        println!("{name}");
        let rig = Rig::new();
        with_liar(&rig, move |mut stream| {
            read_request(&mut stream);
            lie(&mut stream);
        });
        rig.wait_for("protocol_errors", 1);
        assert_eq!(rig.count("serving"), 0);
        recovers(&rig);
    }
}

#[test]
fn back_end_with_too_few_queues_is_refused() {
    let rig = Rig::new();
    let _back_end = BackEnd::start(&rig.socket(), QUEUES - 1);
    rig.wait_for("protocol_errors", 1);
    assert_eq!(rig.count("serving"), 0);
}

/// Each of these calls would block forever if it waited for the back end.
#[test]
fn silent_back_end_holds_up_no_pause_no_reset_and_no_removal() {
    type Act = fn(&mut Rig);
    let acts: [(&str, Act); 4] = [
        ("pause", |rig| rig.driver.function.pause()),
        ("reset of the VM", |rig| rig.driver.function.reset()),
        ("reset by the driver", |rig| rig.driver.reset()),
        ("removal", |_| {}),
    ];
    for answers in 0..3 {
        for (name, act) in acts {
            println!("{name} after {answers} answers");
            let mut rig = Rig::new();
            let (greeted, greeting) = mpsc::channel();
            with_liar(&rig, move |mut stream| {
                for _ in 0..answers {
                    let Some(request) = read_request(&mut stream) else {
                        return;
                    };
                    reply(&mut stream, request, &[0xff; 8]);
                }
                read_request(&mut stream);
                greeted.send(()).ok();
                // No reply, until the VMM closes the connection.
                while read_request(&mut stream).is_some() {}
            });
            greeting.recv_timeout(DEADLINE).unwrap();
            let (acted, end) = mpsc::channel();
            std::thread::spawn(move || {
                act(&mut rig);
                drop(rig);
                acted.send(()).ok();
            });
            end.recv_timeout(DEADLINE).expect(name);
        }
    }
}
