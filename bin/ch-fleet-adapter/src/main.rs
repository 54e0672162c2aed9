//! `ch-fleet-adapter`: publishes to Kubernetes or OpenStack how much memory a host has for VMs, as measured by its
//! ch-fleet agent.
//!
//! Its only input is the agent's status, which it reads from the agent's socket. It is a separate program so that the
//! agent needs no scheduler's protocol and no credentials of a cluster. Published values remain when the program ends; `--withdraw`
//! removes them.

mod args;
mod http;
mod kubernetes;
mod offer;
mod pace;
mod placement;
mod time;

#[cfg(test)]
mod fake_server;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::{CommandFactory, Parser};

use args::{Access, Arguments, Target};
use http::{HttpError, Service};
use kubernetes::Kubernetes;
use offer::{AgentStatus, Offer};
use pace::Pace;
use placement::Placement;

/// Time limit of a query to the agent, which responds from memory.
const AGENT_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum time between two attempts to publish.
const BACK_OFF_MAX: Duration = Duration::from_secs(60);
/// Path of a pod's service account.
const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

fn main() -> ExitCode {
    if let Some(status) = program_docs::requested(Arguments::command) {
        return status;
    }
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}", api::chain_report("ch-fleet-adapter", error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

/// The scheduler that receives the capacity.
enum Scheduler {
    Kubernetes(Kubernetes),
    Placement(Placement),
}

impl Scheduler {
    fn publish(&mut self, offer: &Offer) -> Result<(), HttpError> {
        match self {
            Self::Kubernetes(kubernetes) => kubernetes.publish(offer),
            Self::Placement(placement) => placement.publish(offer),
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let mut scheduler = scheduler(&arguments.target)?;
    if arguments.withdraw {
        return publish(&mut scheduler, &Offer::default());
    }
    if arguments.once {
        return publish(&mut scheduler, &ask(&arguments.socket)?);
    }
    follow(arguments, &mut scheduler)
}

fn follow(arguments: &Arguments, scheduler: &mut Scheduler) -> Result<()> {
    let mut pace = Pace::new(Instant::now());
    let mut not_before = Instant::now();
    let mut failures = 0;
    let mut agent_answers = true;
    loop {
        let heard = ask(&arguments.socket);
        // Logged once when the agent stops responding, and once when it responds again.
        match &heard {
            Err(error) if agent_answers => log(&format!("the agent does not respond: {error:#}")),
            Ok(_) if !agent_answers => log("the agent responds again"),
            _ => {}
        }
        agent_answers = heard.is_ok();
        let now = Instant::now();
        if let Some(offer) = pace.next(heard.ok(), now)
            && now >= not_before
        {
            match scheduler.publish(&offer) {
                Ok(()) => {
                    failures = 0;
                    log_published(&offer);
                    pace.note_published(offer, now);
                }
                Err(error) => {
                    let wait = error
                        .retry_after()
                        .unwrap_or_else(|| arguments.interval() * 2_u32.pow(failures))
                        .min(BACK_OFF_MAX);
                    failures = (failures + 1).min(8);
                    not_before = now + wait;
                    let chain = api::error_line(&error);
                    log(&format!(
                        "not published, retry in {} ms: {chain}",
                        wait.as_millis()
                    ));
                }
            }
        }
        thread::sleep(arguments.interval());
    }
}

fn scheduler(target: &Target) -> Result<Scheduler> {
    Ok(match target {
        Target::Kubernetes {
            node,
            server,
            resource,
            access,
        } => {
            let service = match server {
                Some(server) => access.service(server),
                None => in_cluster(access)?,
            };
            Scheduler::Kubernetes(Kubernetes::new(&service, node, resource)?)
        }
        Target::Placement {
            url,
            provider,
            create,
            resource_class,
            access,
        } => {
            let service = access.service(url);
            Scheduler::Placement(Placement::new(&service, provider, resource_class, *create)?)
        }
    })
}

/// The API server, from a pod's environment.
fn in_cluster(access: &Access) -> Result<Service> {
    let variable = |name: &str| {
        let value = std::env::var(name).ok();
        value.with_context(|| format!("--server is required outside a cluster ({name} is not set)"))
    };
    let host = variable("KUBERNETES_SERVICE_HOST")?;
    let port = variable("KUBERNETES_SERVICE_PORT")?;
    // An IPv6 address contains colons.
    let host = if host.contains(':') {
        format!("[{host}]")
    } else {
        host
    };
    let file = |name: &str| PathBuf::from(SERVICE_ACCOUNT).join(name);
    let mut service = access.service(&format!("https://{host}:{port}"));
    service.token_file.get_or_insert_with(|| file("token"));
    service.ca_file.get_or_insert_with(|| file("ca.crt"));
    Ok(service)
}

fn publish(scheduler: &mut Scheduler, offer: &Offer) -> Result<()> {
    scheduler.publish(offer)?;
    log_published(offer);
    Ok(())
}

/// Queries the agent and returns its latest offer.
fn ask(socket: &Path) -> Result<Offer> {
    let client = api::Client::new(socket).with_timeout(Some(AGENT_TIMEOUT));
    let body = client
        .get("fleet.status")?
        .context("The agent's response is empty")?;
    let status: AgentStatus =
        serde_json::from_str(&body).context("Unexpected response of the agent")?;
    Ok(Offer::of(&status))
}

fn log_published(offer: &Offer) {
    log(&format!(
        "published state={} capacity_mib={} in_use_mib={} free_mib={}",
        offer.state.name(),
        offer.capacity_mib(),
        offer.in_use_mib,
        offer.free_mib
    ));
}

fn log(text: &str) {
    eprintln!("ch-fleet-adapter: {text}");
}
