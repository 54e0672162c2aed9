//! Answers what clients ask the control thread: everything that changes something or reads its state.

use super::control::{Agent, unix_ms};
use super::request::{ConfirmRequest, PinRequest, ReleaseRequest, ReserveAnswer, ReserveRequest};
use crate::admission::{Admission, Obstacle, Refusal, Request as Wanted, admit};
use crate::http::{Method, Request, Response};
use crate::model::Ledger;
use crate::reservations::{BookError, Reservation};

/// How long after its start an agent waits for all VMs' first sample before it promises anything.
const LEARNING_MS: u64 = 10_000;
/// Longest name of a VM.
const NAME_BYTES_MAX: usize = 256;

impl Agent {
    pub(super) fn answer(&mut self, request: &Request) -> Response {
        let name = request.path.rsplit('/').next().unwrap_or_default();
        let answered = match (request.method, name) {
            (Method::Put, "fleet.reserve") => self.reserve(request),
            (Method::Put, "fleet.confirm") => self.confirm(request),
            (Method::Put, "fleet.release") => self.release(request),
            (Method::Put, "fleet.pin") => self.pin(request),
            (Method::Put, "fleet.reload") => {
                self.reload();
                self.reload_answer()
            }
            (Method::Get, "fleet.events") => {
                let since = request
                    .query_value("since")
                    .and_then(|text| text.parse().ok());
                Ok(Response::json(&self.journal.since(since.unwrap_or(0))))
            }
            (Method::Get, "fleet.config") => {
                Ok(Response::text("application/toml", self.settings.to_toml()))
            }
            _ => Err(Response::error(404, &["Not Found".to_owned()])),
        };
        answered.unwrap_or_else(|response| response)
    }

    fn reload_answer(&self) -> Result<Response, Response> {
        if self.reload_ok {
            return Ok(Response::done());
        }
        let why = self.journal.last_of("agent").unwrap_or_default();
        Err(Response::error(
            400,
            &["The new settings are refused".to_owned(), why],
        ))
    }

    fn reserve(&mut self, request: &Request) -> Result<Response, Response> {
        let asked: ReserveRequest = request.json()?;
        let vm = self.name_of(&asked.vm)?;
        let config = &self.settings.config;
        let policy = config.vm_policy(self.settings.policy_name(&vm), asked.memory);
        let wanted = Wanted {
            min: asked.min.unwrap_or(policy.min).min(asked.memory),
            max: asked.memory,
        };
        let uid = request.peer.map_or(u32::MAX, |peer| peer.uid);
        if let Some(held) = self.held_already(&vm, wanted, uid) {
            return Ok(held);
        }
        let verdict = self.verdict(wanted);
        self.tell_verdict(&vm, wanted, &verdict);
        let admission = verdict.map_err(|text| {
            let what = format!("{} for {vm:?} are refused", asked.memory);
            Response::error(409, &[what, text])
        })?;
        let reservation = if asked.dry_run {
            None
        } else {
            let hold = self.settings.config.admission.reservation;
            let made = self
                .book
                .reserve(&vm, (wanted.max, admission.promise), uid, (unix_ms(), hold))
                .map_err(|error| book_error(&error))?;
            Some(made)
        };
        self.publish();
        Ok(Response::json(&ReserveAnswer {
            reservation,
            firm_free_after: admission.left,
        }))
    }

    /// The answer to who asks for what it has.
    fn held_already(&self, vm: &str, wanted: Wanted, uid: u32) -> Option<Response> {
        let held = self.book.find(vm)?;
        let same = held.configured == wanted.max && held.owner_uid == uid;
        same.then(|| {
            Response::json(&ReserveAnswer {
                reservation: Some(held.clone()),
                firm_free_after: self.books().firm_free,
            })
        })
    }

    /// Yes, or why not.
    pub(super) fn verdict(&mut self, wanted: Wanted) -> Result<Admission, String> {
        if self.is_learning() {
            self.admissions.count("refused", "learning");
            return Err(
                "the agent has just started and does not know every VM yet: ask again in a few seconds"
                    .to_owned(),
            );
        }
        self.read_host();
        let books = self.admission_books();
        let verdict = admit(&wanted, &books, &self.settings.config);
        match &verdict {
            Ok(_) => self.admissions.count("admitted", "ok"),
            Err(refusal) => self.admissions.count("refused", reason_of(refusal)),
        }
        verdict.map_err(|refusal| refusal.to_string())
    }

    /// Whether there are VMs of which nothing is known yet, shortly after the start.
    pub(super) fn is_learning(&self) -> bool {
        self.now_ms() < LEARNING_MS
            && self
                .vms
                .iter()
                .any(|vm| vm.reading.is_none() && vm.missed == 0)
    }

    /// The books as they are now, with what the last plan learned of bursts and grants.
    pub(super) fn books(&self) -> Ledger {
        let inventory = self.inventory();
        let reserve = self.settings.config.reserve(inventory.host.limit());
        let last = &self.plan.ledger;
        Ledger::of(&inventory, reserve, last.burst, last.granted)
    }

    pub(super) fn tell_verdict(
        &mut self,
        vm: &str,
        wanted: Wanted,
        verdict: &Result<Admission, String>,
    ) {
        let text = match verdict {
            Ok(admission) => format!("{} admitted, {} promised", wanted.max, admission.promise),
            Err(text) => format!("{} refused: {text}", wanted.max),
        };
        self.journal.enter(unix_ms(), "admission", vm, text);
    }

    fn confirm(&mut self, request: &Request) -> Result<Response, Response> {
        let asked: ConfirmRequest = request.json()?;
        self.may_change(&asked.reservation, request)?;
        let hold = self.settings.config.admission.reservation;
        let confirmed = self
            .book
            .confirm(&asked.reservation, unix_ms(), hold)
            .map_err(|error| book_error(&error))?;
        Ok(Response::json(&confirmed))
    }

    fn release(&mut self, request: &Request) -> Result<Response, Response> {
        let asked: ReleaseRequest = request.json()?;
        self.may_change(&asked.reservation, request)?;
        let released: Reservation = self
            .book
            .release(&asked.reservation)
            .map_err(|error| book_error(&error))?;
        let text = format!("reservation of {} released", released.promised);
        self.journal
            .enter(unix_ms(), "admission", &released.vm, text);
        self.publish();
        Ok(Response::json(&released))
    }

    /// Only who made a reservation, and root, may change it.
    fn may_change(&self, key: &str, request: &Request) -> Result<(), Response> {
        let uid = request.peer.map_or(u32::MAX, |peer| peer.uid);
        match self.book.find(key) {
            Some(entry) if uid != 0 && entry.owner_uid != uid => Err(Response::error(
                403,
                &[format!("The reservation {key:?} is somebody else's")],
            )),
            _ => Ok(()),
        }
    }

    fn pin(&mut self, request: &Request) -> Result<Response, Response> {
        let asked: PinRequest = request.json()?;
        let Some(vm) = self.vms.get_mut(&asked.vm) else {
            return Err(Response::error(
                404,
                &[format!("There is no VM {:?}", asked.vm)],
            ));
        };
        vm.pinned = asked.pinned;
        let text = if asked.pinned { "pinned" } else { "unpinned" };
        self.journal
            .enter(unix_ms(), "vm", &asked.vm, text.to_owned());
        self.plan_wanted = true;
        Ok(Response::done())
    }

    /// The name discovery will give: a path is a socket that may not exist yet.
    fn name_of(&self, vm: &str) -> Result<String, Response> {
        let name = if vm.starts_with('/') {
            self.discovery_name(vm)
        } else {
            Some(vm.to_owned())
        };
        let refuse = |text: String| Response::error(400, &[text]);
        let name = name.ok_or_else(|| {
            refuse(format!(
                "The socket {vm} matches none of the patterns in discovery.sockets, so the VM would not be looked after"
            ))
        })?;
        self.checked_name(name).map_err(refuse)
    }

    /// A name that may be a VM's.
    pub(super) fn checked_name(&self, name: String) -> Result<String, String> {
        if name.is_empty() || name.len() > NAME_BYTES_MAX || name.chars().any(char::is_control) {
            return Err(format!("{name:?} is no name for a VM"));
        }
        Ok(name)
    }
}

/// The first obstacle as a word for metrics.
fn reason_of(refusal: &Refusal) -> &'static str {
    match refusal.obstacles.first() {
        Some(Obstacle::State(_)) => "state",
        Some(Obstacle::Overcommit { .. }) => "overcommit",
        Some(Obstacle::TooLarge(_)) => "too-large",
        Some(Obstacle::Short(_)) | None => "memory",
    }
}

/// Why a promise that was admitted is not made all the same.
pub(super) fn book_refusal(error: &BookError) -> String {
    api::error_chain(error).join(": ")
}

fn book_error(error: &BookError) -> Response {
    let status = match error {
        BookError::Held { .. } | BookError::Full => 409,
        BookError::Unknown { .. } => 404,
        BookError::Save(_) => 500,
    };
    Response::error(status, &api::error_chain(error))
}
