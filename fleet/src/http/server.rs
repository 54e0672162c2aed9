//! Listens, and serves each connection on a thread of its own.

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

use super::message::{ReadError, read_request};
use super::stream::{Limited, Timed};
use super::{Method, Peer, Request, Response};

/// Connections served at once; the next one is told to come back.
pub const CONNECTIONS_MAX: usize = 64;
/// How long a connection that is one too many may take to be told so: the thread that accepts waits for it.
const REFUSAL_DEADLINE: Duration = Duration::from_millis(100);
/// How often an idle server looks whether it shall end.
const STOP_POLL: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 200_000_000,
};
/// See [`pause_after`].
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// An answer of the size that occurs takes some tens of KiB of stack to write as JSON, more without optimisation.
const STACK_BYTES: usize = 512 << 10;

/// How long one request and its answer may take, however they trickle.
#[derive(Clone, Copy, Debug)]
pub struct Deadlines {
    /// A request, to arrive; with TLS the handshake is part of it.
    pub request: Duration,
    /// An answer, to leave.
    pub answer: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            request: Duration::from_secs(5),
            answer: Duration::from_secs(10),
        }
    }
}

/// A listening server; ends when dropped, and takes its socket file with it.
#[derive(Debug)]
pub struct HttpServer {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    address: Option<SocketAddr>,
    socket: Option<PathBuf>,
}

impl HttpServer {
    /// The TCP address; absent for a UNIX socket.
    pub fn address(&self) -> Option<SocketAddr> {
        self.address
    }
}

impl Drop for HttpServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic there was already printed.
            let _ = thread.join();
        }
        if let Some(socket) = &self.socket {
            // Gone already is as good.
            let _ = fs::remove_file(socket);
        }
    }
}

/// Serves a UNIX socket with this mode.
///
/// # Errors
/// Somebody else listens there, or the socket cannot be made.
pub fn serve_unix(
    path: &Path,
    mode: u32,
    handler: impl Fn(&Request) -> Response + Send + Sync + 'static,
) -> io::Result<HttpServer> {
    if UnixStream::connect(path).is_ok() {
        return Err(io::Error::new(
            io::ErrorKind::AddrInUse,
            format!("somebody listens at {} already", path.display()),
        ));
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // Bound under another name first, so that nobody can connect before the mode is set.
    let hidden = path.with_extension("new");
    // Left over from an agent that was killed in between, or not there at all.
    let _ = fs::remove_file(&hidden);
    let listener = UnixListener::bind(&hidden)?;
    fs::set_permissions(&hidden, fs::Permissions::from_mode(mode))?;
    fs::rename(&hidden, path)?;
    listener.set_nonblocking(true)?;
    let accept = move |listener: &UnixListener| {
        let (stream, _) = listener.accept()?;
        stream.set_nonblocking(false)?;
        let peer = rustix::net::sockopt::socket_peercred(&stream)?;
        let peer = Peer {
            pid: peer.pid.as_raw_nonzero().get(),
            uid: peer.uid.as_raw(),
        };
        Ok((Limited::new(stream), Some(peer)))
    };
    let mut server = start(listener, accept, Deadlines::default(), handler)?;
    server.socket = Some(path.to_owned());
    Ok(server)
}

/// Serves a TCP address, with TLS if there is a configuration of it.
///
/// # Errors
/// The address cannot be listened at.
pub fn serve_tcp(
    address: SocketAddr,
    tls: Option<Arc<ServerConfig>>,
    deadlines: Deadlines,
    handler: impl Fn(&Request) -> Response + Send + Sync + 'static,
) -> io::Result<HttpServer> {
    let listener = TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    let accept = |listener: &TcpListener| {
        let (stream, _) = listener.accept()?;
        stream.set_nonblocking(false)?;
        io::Result::Ok(Limited::new(stream))
    };
    let mut server = match tls {
        None => {
            let accept = move |listener: &TcpListener| Ok((accept(listener)?, None));
            start(listener, accept, deadlines, handler)?
        }
        Some(tls) => {
            let accept = move |listener: &TcpListener| {
                let stream = accept(listener)?;
                let session = ServerConnection::new(Arc::clone(&tls)).map_err(io::Error::other)?;
                Ok((StreamOwned::new(session, stream), None))
            };
            start(listener, accept, deadlines, handler)?
        }
    };
    server.address = Some(address);
    Ok(server)
}

fn start<L: AsFd + Send + 'static, S: Timed + Send + 'static>(
    listener: L,
    accept: impl Fn(&L) -> io::Result<(S, Option<Peer>)> + Send + 'static,
    deadlines: Deadlines,
    handler: impl Fn(&Request) -> Response + Send + Sync + 'static,
) -> io::Result<HttpServer> {
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let handler: Arc<dyn Fn(&Request) -> Response + Send + Sync> = Arc::new(handler);
    let open = Arc::new(AtomicUsize::new(0));
    let thread = thread::Builder::new()
        .name("http".to_owned())
        .spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let mut polled = [PollFd::new(&listener, PollFlags::IN)];
                if !matches!(poll(&mut polled, Some(&STOP_POLL)), Ok(1..)) {
                    continue;
                }
                // Whatever went wrong, the next round tries anew.
                match accept(&listener) {
                    Ok(connection) => serve(connection, deadlines, &handler, &open),
                    Err(error) => thread::sleep(pause_after(&error)),
                }
            }
        })?;
    Ok(HttpServer {
        stop,
        thread: Some(thread),
        address: None,
        socket: None,
    })
}

/// How long nothing is accepted after a failure. A client that is gone again leaves nothing behind. One that could not be
/// taken, because there are too few descriptors above all, waits still, and the loop would find it again at once.
fn pause_after(error: &io::Error) -> Duration {
    match error.kind() {
        io::ErrorKind::WouldBlock
        | io::ErrorKind::Interrupted
        | io::ErrorKind::ConnectionAborted => Duration::ZERO,
        _ => ACCEPT_PAUSE,
    }
}

type Handler = Arc<dyn Fn(&Request) -> Response + Send + Sync>;

/// Counts a connection for as long as it is served, however that ends.
struct Open(Arc<AtomicUsize>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn serve<S: Timed + Send + 'static>(
    (mut stream, peer): (S, Option<Peer>),
    deadlines: Deadlines,
    handler: &Handler,
    open: &Arc<AtomicUsize>,
) {
    let count = open.fetch_add(1, Ordering::Relaxed);
    let open = Open(Arc::clone(open));
    if count >= CONNECTIONS_MAX {
        // Clients that never end their handshake would have all others wait for this thread.
        if stream.answers_at_once() {
            let refusal = Response::error(503, &["Too many connections".to_owned()]);
            answer(&mut stream, &refusal, REFUSAL_DEADLINE);
        }
        return;
    }
    let handler = Arc::clone(handler);
    let started = thread::Builder::new()
        .name("http-request".to_owned())
        .stack_size(STACK_BYTES)
        .spawn(move || {
            let _open = open;
            stream.until(Instant::now() + deadlines.request);
            let response = match read_request(&mut stream) {
                Ok(request) if request.method == Method::Other => {
                    Response::error(400, &["Only GET and PUT are served".to_owned()])
                }
                Ok(request) => handler(&Request { peer, ..request }),
                Err(ReadError::Refused(response)) => response,
                Err(ReadError::Gone) => return,
            };
            answer(&mut stream, &response, deadlines.answer);
        });
    if let Err(error) = started {
        log::warn!("no thread for a request: {error}");
    }
}

fn answer(stream: &mut impl Timed, response: &Response, deadline: Duration) {
    stream.until(Instant::now() + deadline);
    // Whoever asked may be gone; that is their business.
    let _ = response.write(stream).and_then(|()| stream.finish());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn server_without_descriptors_waits_for_some_and_one_whose_client_went_does_not() {
        let pause = |kind: io::ErrorKind| pause_after(&kind.into());
        assert_eq!(pause(io::ErrorKind::WouldBlock), Duration::ZERO);
        assert_eq!(pause(io::ErrorKind::ConnectionAborted), Duration::ZERO);
        // EMFILE
        assert_eq!(pause_after(&io::Error::from_raw_os_error(24)), ACCEPT_PAUSE);
    }
}
