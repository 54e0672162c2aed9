//! Access control of the page and the metrics over TCP.
//!
//! A foreign page in a browser can make its own name resolve to this host (DNS rebinding) and then read the responses.
//! Therefore the `Host` that a client sends must name this host. If a token is configured, every client must send it.

use std::net::IpAddr;

use super::error::AgentError;
use crate::agent_config::AgentSection;
use crate::http::{Request, Response};
use crate::secret_file::read_secret;

/// The requirements that a client must meet.
#[derive(Debug)]
pub(super) struct PageGuard {
    names: Vec<String>,
    token: Option<String>,
}

impl PageGuard {
    /// The guard with these settings on the host called `machine`.
    pub(super) fn new(agent: &AgentSection, machine: &str) -> Result<Self, AgentError> {
        let mut names = agent.listen_names.clone();
        names.extend(["localhost".to_owned(), machine.to_owned()]);
        let token = agent.token_file.as_ref().map(|path| {
            read_secret(path).map_err(|source| AgentError::Token {
                path: path.clone(),
                source,
            })
        });
        Ok(Self {
            names,
            token: token.transpose()?,
        })
    }

    /// Accepts a request, or returns the reason for rejecting it.
    pub(super) fn check(&self, request: &Request) -> Result<(), Response> {
        let refuse = |status, text: &str| Err(Response::error(status, &[text.to_owned()]));
        let Some(host) = &request.host else {
            return refuse(400, "The request has no Host");
        };
        if !self.is_ours(host) {
            return refuse(
                421,
                "This host has another name than the request's Host; others are set with agent.listen_names",
            );
        }
        let Some(token) = &self.token else {
            return Ok(());
        };
        match request.authorization.as_deref().and_then(bearer) {
            Some(given) if is_same(given, token) => Ok(()),
            _ => refuse(401, "A token is needed"),
        }
    }

    /// Whether a `Host` names this host. The owner of an address cannot redirect it here, so every address is accepted.
    fn is_ours(&self, host: &str) -> bool {
        let name = match host.rsplit_once(':') {
            Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
            _ => host,
        };
        let address = name
            .strip_prefix('[')
            .and_then(|name| name.strip_suffix(']'))
            .unwrap_or(name);
        address.parse::<IpAddr>().is_ok()
            || self
                .names
                .iter()
                .any(|ours| ours.eq_ignore_ascii_case(name))
    }
}

fn bearer(authorization: &str) -> Option<&str> {
    let (scheme, token) = authorization.split_once(' ')?;
    scheme
        .eq_ignore_ascii_case("bearer")
        .then_some(token.trim())
}

/// Compares in a time that does not reveal how much matches.
fn is_same(given: &str, token: &str) -> bool {
    let pairs = given.bytes().zip(token.bytes());
    let wrong = pairs.fold(0, |wrong, (a, b)| wrong | (a ^ b));
    given.len() == token.len() && std::hint::black_box(wrong) == 0
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fs;

    use super::*;
    use crate::http::Method;

    fn status(guard: &PageGuard, host: Option<&str>, authorization: Option<&str>) -> u16 {
        let request = Request {
            method: Method::Get,
            path: "/".to_owned(),
            query: String::new(),
            host: host.map(str::to_owned),
            authorization: authorization.map(str::to_owned),
            body: Vec::new(),
            peer: None,
        };
        guard
            .check(&request)
            .map_or_else(|refusal| refusal.status, |()| 200)
    }

    #[test]
    fn only_names_of_this_host_are_answered() {
        let agent = AgentSection {
            listen_names: vec!["metrics.example".to_owned()],
            ..AgentSection::default()
        };
        let guard = PageGuard::new(&agent, "node-17").unwrap();
        for host in [
            "127.0.0.1:9273",
            "[::1]:9273",
            "[::1]",
            "10.1.2.3",
            "LOCALHOST:9273",
            "node-17",
            "Metrics.Example:80",
        ] {
            assert_eq!(status(&guard, Some(host), None), 200, "{host}");
        }
        for host in [
            "evil.example",
            "node-17.evil.example",
            "127.0.0.1.evil.example:9273",
            "",
        ] {
            assert_eq!(status(&guard, Some(host), None), 421, "{host}");
        }
        assert_eq!(status(&guard, None, None), 400);
    }

    #[test]
    fn token_is_asked_of_everybody_once_it_is_set() {
        let folder = tempfile::TempDir::new().unwrap();
        let path = folder.path().join("token");
        let agent = AgentSection {
            token_file: Some(path.clone()),
            ..AgentSection::default()
        };
        assert!(PageGuard::new(&agent, "a").is_err());
        for bad in ["\n".to_owned(), "x".repeat(5000)] {
            fs::write(&path, bad).unwrap();
            assert!(PageGuard::new(&agent, "a").is_err());
        }
        fs::write(&path, "secret\n").unwrap();
        let guard = PageGuard::new(&agent, "a").unwrap();
        let status = |authorization| status(&guard, Some("a"), authorization);
        assert_eq!(status(Some("Bearer secret")), 200);
        assert_eq!(status(Some("bearer  secret")), 200);
        for bad in [
            "Bearer secre",
            "Bearer secrets",
            "Bearer ",
            "Basic secret",
            "secret",
        ] {
            assert_eq!(status(Some(bad)), 401, "{bad}");
        }
        assert_eq!(status(None), 401);
    }
}
