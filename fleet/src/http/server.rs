//! The server: listens, and serves each connection on a separate thread.

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustls::{ServerConfig, ServerConnection, StreamOwned};

use super::message::{ReadError, read_request};
use super::stream::{Limited, Timed};
use super::{Method, Peer, Request, Response};

/// Maximum number of concurrent connections; further ones are rejected with an error that asks for a retry.
pub const CONNECTIONS_MAX: usize = 64;
/// Time limit for rejecting a connection beyond the limit, because the accepting thread waits for it.
const REFUSAL_DEADLINE: Duration = Duration::from_millis(100);
/// Interval at which an idle server checks whether it must end.
const STOP_POLL: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 200_000_000,
};
/// See [`pause_after`].
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Serializing a typical response as JSON takes some tens of KiB of stack, more without optimisation.
const STACK_BYTES: usize = 512 << 10;

/// Time limits of a request and its response, even if bytes keep arriving.
#[derive(Clone, Copy, Debug)]
pub struct Deadlines {
    /// Time to receive a request, including a TLS handshake.
    pub request: Duration,
    /// Time to send a response.
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

/// A listening server. Dropping it ends it and removes its socket file.
#[derive(Debug)]
pub struct HttpServer {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    address: Option<SocketAddr>,
    socket: Option<SocketFile>,
}

/// The file of a socket that this process created.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let found = fs::symlink_metadata(&self.path);
        if found.is_ok_and(|it| (it.dev(), it.ino()) == (self.device, self.inode)) {
            // Another process may have removed the file by now.
            let _ = fs::remove_file(&self.path);
        }
    }
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
            // A panic there has already been printed.
            let _ = thread.join();
        }
        drop(self.socket.take());
    }
}

/// Serves a UNIX socket with this mode. Replaces a socket on which no process listens, and no other file.
///
/// # Errors
/// Another process listens there, the path is another file, or the socket cannot be created.
pub fn serve_unix(
    path: &Path,
    mode: u32,
    handler: impl Fn(&Request) -> Response + Send + Sync + 'static,
) -> io::Result<HttpServer> {
    remove_stale(path)?;
    // Bound under another name first, so that no client can connect before the mode is set.
    let hidden = path.with_extension("new");
    remove_stale(&hidden)?;
    let listener = UnixListener::bind(&hidden)?;
    fs::set_permissions(&hidden, fs::Permissions::from_mode(mode))?;
    let bound = fs::symlink_metadata(&hidden)?;
    // Unlike a rename, a link does not replace what another process has put there in the meantime.
    let linked = fs::hard_link(&hidden, path);
    fs::remove_file(&hidden)?;
    linked?;
    let socket = SocketFile {
        path: path.to_owned(),
        device: bound.dev(),
        inode: bound.ino(),
    };
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
    server.socket = Some(socket);
    Ok(server)
}

/// Removes the socket that a killed agent left behind.
///
/// A stream connection would occupy a client's place in the backlog of a live listener, so the probe uses another socket
/// type. The kernel returns "wrong type" if a process listens, and "refused" if none does.
fn remove_stale(path: &Path) -> io::Result<()> {
    let found = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        found => found?,
    };
    let path_text = path.display();
    if !found.file_type().is_socket() {
        return Err(io::Error::new(
            io::ErrorKind::AlreadyExists,
            format!("{path_text} exists and is not a socket"),
        ));
    }
    match UnixDatagram::unbound()?.connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        Err(error) if error.raw_os_error() != Some(Errno::PROTOTYPE.raw_os_error()) => {
            Err(io::Error::new(
                error.kind(),
                format!("cannot check whether another process listens at {path_text}: {error}"),
            ))
        }
        _ => Err(io::Error::new(
            io::ErrorKind::AddrInUse,
            format!("another process already listens at {path_text}"),
        )),
    }
}

/// Serves a TCP address, with TLS if configured.
///
/// # Errors
/// Listening on the address failed.
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
                // After any failure, the next iteration tries again.
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

/// How long the server accepts no connections after a failure. If the client disconnected, no pause is needed. If the
/// connection could not be accepted, mainly for lack of descriptors, it is still pending, and the loop would retry it
/// immediately.
fn pause_after(error: &io::Error) -> Duration {
    match error.kind() {
        io::ErrorKind::WouldBlock
        | io::ErrorKind::Interrupted
        | io::ErrorKind::ConnectionAborted => Duration::ZERO,
        _ => ACCEPT_PAUSE,
    }
}

type Handler = Arc<dyn Fn(&Request) -> Response + Send + Sync>;

/// Counts a connection while it is served.
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
        // Otherwise, clients that never complete their handshake would block this thread and all other clients.
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
        log::warn!("cannot start a thread for a request: {error}");
    }
}

fn answer(stream: &mut impl Timed, response: &Response, deadline: Duration) {
    stream.until(Instant::now() + deadline);
    // The client may have disconnected, which is not an error.
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
