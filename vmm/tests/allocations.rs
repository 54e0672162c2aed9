//! Tests through the socket that no request to any endpoint makes the VMM allocate a large block. The allocator counts
//! all threads, so this is the only test of its program.

#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use api::{Endpoint, VmmPingResponse};
use vmm::api::Dispatcher;
use vmm::api::http::{Deadlines, HttpServer};
use vmm::control::{ControlSetup, ControlThread, Lifecycle};
use vmm::view::PublishedView;
use vmm::vm::{Vm, VmContext};

#[global_allocator]
static ALLOCATOR: test_alloc::Recording = test_alloc::Recording;

/// The largest allocation that a request may cause: twice the largest body.
const ALLOCATION_BYTES_MAX: usize = 8 << 20;
/// The largest body that the server accepts.
const BODY_BYTES_MAX: usize = 4 << 20;

/// Bodies at the limits: of bytes, of values, of items in a list, of keys, and of depth.
fn bodies() -> Vec<String> {
    let room = BODY_BYTES_MAX - 200;
    let list = |item: &str, count: usize| {
        let count = count.min(room / (item.len() + 1));
        vec![item; count].join(",")
    };
    let members = |count: usize| -> String {
        let all: Vec<_> = (0..count).map(|name| format!("\"{name}\":1")).collect();
        all.join(",")
    };
    let long = "k".repeat(room);
    let mut bodies = vec![
        String::new(),
        "{".repeat(room),
        "[".repeat(room),
        " ".repeat(room),
        format!("\"{long}\""),
        format!("{{\"{long}\":1}}"),
        format!("{{\"id\":\"{long}\"}}"),
        format!("{{\"path\":\"{long}\"}}"),
        format!("{{\"payload\":{{\"kernel\":\"{long}\"}}}}"),
        format!("{{\"source_url\":\"file:///{long}\"}}"),
        format!("{{\"destination_url\":\"file:///{long}\"}}"),
        format!("{{\"id\":\"{}\"}}", "\\u0001".repeat(room / 6)),
        format!("{{{}}}", members(50_000)),
        format!("{{\"unknown\":{{{}}}}}", members(50_000)),
    ];
    for key in ["disks", "unknown"] {
        for item in ["{}", "1", "[]", "\"aaaaaaaa\"", "{\"a\":[1]}"] {
            for count in [8192, 1 << 20] {
                bodies.push(format!("{{\"{key}\":[{}]}}", list(item, count)));
            }
        }
    }
    bodies
}

fn send(socket: &std::path::Path, head: &str, body: &str) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    // The server may reject the request before it has read everything.
    let _ = stream.write_all(head.as_bytes());
    let _ = stream.write_all(body.as_bytes());
    let mut start = [0; 64];
    let count = stream.read(&mut start).unwrap_or(0);
    String::from_utf8_lossy(&start[..count]).into_owned()
}

#[test]
fn no_request_causes_a_large_allocation() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    let view = Arc::new(PublishedView::default());
    let context = VmContext::new(Arc::new(|_| {}), Arc::new(|_| {})).unwrap();
    let control = ControlThread::start(ControlSetup {
        make_machine: |config, context, snapshot| Ok(Box::new(Vm::new(config, context, snapshot)?)),
        view: Arc::clone(&view),
        context,
        no_shutdown: false,
        events_are_read: false,
        on_start: Box::new(|| {}),
    })
    .unwrap();
    let dispatcher = Dispatcher::new(
        view,
        control.handle(),
        VmmPingResponse::default(),
        Arc::new(|_| {}),
    );
    let listener = UnixListener::bind(&socket).unwrap();
    let server = HttpServer::start(listener, dispatcher, Deadlines::default(), || {}).unwrap();

    let bodies = bodies();
    // The largest body must itself be recorded.
    assert!(test_alloc::take_largest_of_all_threads() >= BODY_BYTES_MAX - 200);
    let (mut largest, mut statuses) = (0, std::collections::BTreeMap::new());
    let mut note = |what: &dyn std::fmt::Display, answer: &str| {
        let bytes = test_alloc::take_largest_of_all_threads();
        assert!(bytes <= ALLOCATION_BYTES_MAX, "{what}: {bytes} bytes");
        largest = largest.max(bytes);
        let status = answer.split(' ').nth(1).unwrap_or("none").to_owned();
        *statuses.entry(status).or_insert(0) += 1;
    };
    for endpoint in Endpoint::ALL {
        if *endpoint == Endpoint::VmmShutdown {
            continue;
        }
        // An endpoint without a body rejects every one alike.
        let tried = match endpoint.request() {
            Some(_) => &bodies[..],
            None => &bodies[..3],
        };
        for body in tried {
            let head = format!(
                "{} {} HTTP/1.1\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
                endpoint.method().as_str(),
                endpoint.path(),
                body.len()
            );
            let answer = send(&socket, &head, body);
            let start = &body[..body.len().min(40)];
            note(&format!("{} {start}", endpoint.name()), &answer);
            // An accepted configuration must not make the next one fail.
            control
                .handle()
                .call(Endpoint::VmDelete, Lifecycle::delete)
                .unwrap();
        }
    }
    for head in [
        format!("PUT /{} HTTP/1.1\r\n\r\n", "x".repeat(1 << 20)),
        format!(
            "PUT /api/v1/vm.boot HTTP/1.1\r\nA: {}\r\n\r\n",
            "x".repeat(1 << 20)
        ),
        format!(
            "PUT /api/v1/vm.boot HTTP/1.1\r\n{}\r\n",
            "A: b\r\n".repeat(1 << 18)
        ),
        "PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 18446744073709551615\r\n\r\n".to_owned(),
    ] {
        let answer = send(&socket, &head, "");
        note(&&head[..40], &answer);
    }
    println!("largest allocation: {largest} bytes; responses by status: {statuses:?}");
    assert!(largest >= BODY_BYTES_MAX - 200, "{largest}");
    assert!(
        statuses.contains_key("204") && statuses.contains_key("400"),
        "{statuses:?}"
    );
    drop(server);
    control
        .handle()
        .call(Endpoint::VmmShutdown, Lifecycle::end)
        .unwrap();
    control.join();
}
