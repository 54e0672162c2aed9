//! The endpoints of each socket. Requests for published data never reach the control thread.

use super::{Published, Status};
use crate::http::{Method, Request, Response};
use crate::metrics;

/// Names below `/api/v1` of the local socket.
pub const LOCAL_NAMES: [&str; 13] = [
    "fleet.status",
    "fleet.explain",
    "fleet.events",
    "fleet.config",
    "fleet.reserve",
    "fleet.confirm",
    "fleet.release",
    "fleet.pin",
    "fleet.reload",
    "fleet.standby",
    "fleet.wake",
    "fleet.woken",
    "fleet.discard",
];

/// The endpoints that return published data.
const READ_NAMES: [&str; 3] = ["fleet.status", "fleet.explain", "fleet.events"];

/// Content type of the Prometheus text format in its OpenMetrics form.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The page and its resources: path, content type, content.
const PAGE: [(&str, &str, &str); 3] = [
    ("/", "text/html; charset=utf-8", include_str!("page.html")),
    (
        "/page.css",
        "text/css; charset=utf-8",
        include_str!("page.css"),
    ),
    (
        "/page.js",
        "text/javascript; charset=utf-8",
        include_str!("page.js"),
    ),
];

/// The local socket: everything.
pub(super) fn handle_local(
    request: &Request,
    published: &Published,
    ask: impl Fn(&Request) -> Response,
) -> Response {
    let Some(name) = request.path.strip_prefix(api::API_PREFIX) else {
        return handle_page(request, published);
    };
    match (request.method, name) {
        (Method::Get, name) if READ_NAMES.contains(&name) => handle_read(request, published),
        _ if LOCAL_NAMES.contains(&name) => ask(request),
        _ => Response::error(404, &["Not Found".to_owned()]),
    }
}

/// The read-only socket: published data, and the page.
pub(super) fn handle_read(request: &Request, published: &Published) -> Response {
    let Some(name) = request.path.strip_prefix(api::API_PREFIX) else {
        return handle_page(request, published);
    };
    match (request.method, name) {
        (Method::Get, "fleet.status") => Response::json(&published.get().status),
        (Method::Get, "fleet.explain") => Response::json(&*published.get().plan),
        (Method::Get, "fleet.events") => events(request, published),
        _ if LOCAL_NAMES.contains(&name) => {
            Response::error(403, &[format!("{name} is not served at this socket")])
        }
        _ => Response::error(404, &["Not Found".to_owned()]),
    }
}

/// The page and the metrics, over TCP: nothing that changes state, and nothing about the host's configuration.
pub fn handle_page(request: &Request, published: &Published) -> Response {
    if request.method != Method::Get {
        return Response::error(400, &["Only GET is served here".to_owned()]);
    }
    let part = PAGE.iter().find(|(path, ..)| *path == request.path);
    if let Some((_, content_type, content)) = part {
        return Response::text(content_type, *content);
    }
    match request.path.as_str() {
        "/metrics" => Response::text(OPEN_METRICS, metrics::render(&published.get(), published)),
        "/status.json" => Response::json(&without_paths(&published.get().status)),
        "/events.json" => events(request, published),
        "/healthz" => Response::text("text/plain; charset=utf-8", "ok\n"),
        _ => Response::error(404, &["Not Found".to_owned()]),
    }
}

fn events(request: &Request, published: &Published) -> Response {
    let since = request
        .query_value("since")
        .and_then(|text| text.parse().ok());
    Response::json(&published.journal.since(since.unwrap_or(0)))
}

fn without_paths(status: &Status) -> Status {
    let mut status = status.clone();
    if let Some(store) = &mut status.store {
        store.endpoints.clear();
        // The error may contain the endpoints, too.
        store.error = store.error.take().map(|_| "out of step".to_owned());
    }
    for vm in &mut status.vms {
        vm.socket.clear();
        vm.pid = None;
    }
    for vm in &mut status.standby {
        vm.socket.clear();
        vm.folder.clear();
        // The reason contains paths.
        vm.fault = vm.fault.take().map(|_| "cannot be used".to_owned());
    }
    status
}
