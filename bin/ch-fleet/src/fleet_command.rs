//! Implements `ch-fleet fleet`, which shows and changes all hosts through the shared store. It does not contact an
//! agent.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};
use fleet::admission::Request;
use fleet::agent_config::{AgentConfig, DEFAULT_FILE, load};
use fleet::cluster::{DrainMark, FleetPicture, MoveOrder, Placer, Wanted};
use fleet::model::Bytes;
use fleet::placement::{HostCapacity, MovableVm, drain, rebalance};
use fleet::store::Store;

use crate::args::{DrainOptions, FleetArguments, FleetCommand, Output, PlaceOptions};
use crate::ask::Unknown;
use crate::drain_command;
use crate::fleet_tables;
use crate::fleet_tables::{Advice, Choice, HostLine};
use crate::output::print;

struct Fleet {
    config: AgentConfig,
    seed: u64,
    until: Instant,
}

pub(crate) fn run(
    arguments: &FleetArguments,
    timeout: Duration,
    output: Output,
    out: &mut dyn Write,
) -> Result<ExitCode> {
    let fleet = Fleet::open(arguments, timeout)?;
    let store = fleet.config.store.connect(fleet.seed as usize)?;
    let placer = Placer::new(
        &*store,
        fleet.config.store.keys()?,
        fleet.config.planning.clone(),
        fleet.config.store.deadline.duration(),
        fleet.seed,
    );
    match &arguments.command {
        FleetCommand::Status => {
            let hosts = lines(&placer.picture(fleet.until)?);
            print(out, output, &hosts, |out| fleet_tables::hosts(out, &hosts))?;
        }
        FleetCommand::Place(options) => {
            let choice = fleet.place(&placer, options)?;
            print(out, output, &choice, |out| {
                fleet_tables::choice(out, &choice)
            })?;
        }
        FleetCommand::Release { id } => {
            let entry = placer.release(id, fleet.until)?;
            print(out, output, &entry, |out| {
                writeln!(out, "{} of {} released", entry.promise, entry.vm)
            })?;
        }
        FleetCommand::Drain(options) => {
            return fleet.drain(&*store, &placer, options, (output, out));
        }
        FleetCommand::Advice => {
            let picture = placer.picture(fleet.until)?;
            let vms = FleetPicture::vms(&*store, &fleet.config.store.keys()?, fleet.until)?;
            let advice = fleet.advise_rebalance(&picture, &vms);
            print(out, output, &advice, |out| {
                fleet_tables::advice(out, &advice)
            })?;
        }
    }
    out.flush().context("Cannot write the output")?;
    Ok(ExitCode::SUCCESS)
}

impl Fleet {
    fn open(arguments: &FleetArguments, timeout: Duration) -> Result<Self> {
        let required = arguments.config != Path::new(DEFAULT_FILE);
        let mut config = load(&arguments.config, required)?.config;
        if !arguments.endpoint.is_empty() {
            config.store.endpoints.clone_from(&arguments.endpoint);
        }
        config.store.check()?;
        if !config.store.is_used() {
            bail!(
                "No store is configured: set --endpoint, or store.endpoints in {}",
                arguments.config.display()
            );
        }
        Ok(Self {
            config,
            seed: Placer::seed(),
            until: Instant::now() + timeout,
        })
    }

    fn place(&self, placer: &Placer<'_>, options: &PlaceOptions) -> Result<Choice> {
        let vm = options
            .name
            .clone()
            .unwrap_or_else(|| format!("vm-{:08x}", self.seed as u32));
        let memory = Bytes(options.memory);
        let config = &self.config.planning;
        let policy = config.vm_policy(self.config.policy_name(&vm), memory);
        let request = Request {
            min: options.min.map_or(policy.min, Bytes).min(memory),
            max: memory,
        };
        if options.reserve {
            let wanted = Wanted {
                vm,
                request,
                placer: who(),
            };
            let placed = placer.reserve(&wanted, self.until)?;
            return Ok(Choice {
                host: placed.host,
                vm: placed.vm,
                promised: placed.promised,
                id: Some(placed.id),
            });
        }
        let picture = placer.picture(self.until)?;
        let host = placer
            .choose(&request, &picture, &BTreeMap::new())
            .map_err(fleet::cluster::PlaceError::Refused)?;
        Ok(Choice {
            host: host.host.clone(),
            vm,
            promised: request.needs(config),
            id: None,
        })
    }

    fn drain(
        &self,
        store: &dyn Store,
        placer: &Placer<'_>,
        options: &DrainOptions,
        (output, out): (Output, &mut dyn Write),
    ) -> Result<ExitCode> {
        let host = options.host.as_str();
        let keys = self.config.store.keys()?;
        let picture = placer.picture(self.until)?;
        let known = picture
            .find(host)
            .ok_or_else(|| anyhow::Error::from(Unknown::host(host)))?;
        if options.execute {
            drain_command::require_mover(known)?;
        }
        let mark = (!options.undo).then(drain_mark);
        placer.mark(host, mark.as_ref(), self.until)?;
        let moves = drain_command::Moves {
            store,
            keys: keys.clone(),
            host,
        };
        if options.undo {
            moves.withdraw(self.until)?;
        }
        let advice = if options.undo {
            Advice::of(BTreeMap::new())
        } else {
            let vms = FleetPicture::vms(store, &keys, self.until)?;
            self.advise_drain(&picture, host, &vms)
        };
        // As JSON, the result of the moves is the only output.
        if !options.execute || output == Output::Table {
            print(out, output, &advice, |out| {
                fleet_tables::drained(out, host, options, &advice)
            })?;
        }
        out.flush().context("Cannot write the output")?;
        if !options.execute {
            return Ok(ExitCode::SUCCESS);
        }
        let share = u64::from(options.parallel) << 20;
        if options.bandwidth.is_some_and(|all| all < share) {
            bail!("--bandwidth must be at least 1 MiB per second for each of the --parallel moves");
        }
        let order = MoveOrder {
            parallel: options.parallel,
            bytes_per_second_max: options.bandwidth.map(Bytes),
            by: who(),
        };
        moves.order(&order, self.until)?;
        let left = moves.wait(self.config.store.deadline.duration())?;
        print(out, output, &left, |out| {
            drain_command::table(out, host, &left)
        })?;
        Ok(match left.stay.is_empty() {
            true => ExitCode::SUCCESS,
            false => ExitCode::FAILURE,
        })
    }

    fn advise_drain(
        &self,
        picture: &FleetPicture,
        host: &str,
        vms: &BTreeMap<String, Vec<MovableVm>>,
    ) -> Advice {
        let others = capacities(picture, host);
        let here = vms.get(host).map_or(&[][..], Vec::as_slice);
        let moves = drain(here, &others, NOW_MS, &self.config.planning);
        Advice::of(BTreeMap::from([(host.to_owned(), moves)]))
    }

    fn advise_rebalance(
        &self,
        picture: &FleetPicture,
        vms: &BTreeMap<String, Vec<MovableVm>>,
    ) -> Advice {
        let there = picture.hosts.iter().filter(|host| host.record.is_some());
        let advised = there.filter_map(|host| {
            let others = capacities(picture, &host.host);
            let here = vms.get(&host.host).map_or(&[][..], Vec::as_slice);
            let capacity = host.capacity(NOW_MS);
            let moves = rebalance(&capacity, here, &others, NOW_MS, &self.config.planning);
            let any = !moves.moves.is_empty() || !moves.stay.is_empty();
            any.then(|| (host.host.clone(), moves))
        });
        Advice::of(advised.collect())
    }
}

/// The current time. Hosts publish the age of their figures, so any time later than all of them works.
const NOW_MS: u64 = u32::MAX as u64;

fn capacities(picture: &FleetPicture, but: &str) -> Vec<HostCapacity> {
    let others = picture
        .hosts
        .iter()
        .filter(|host| host.is_there() && host.host != but);
    others.map(|host| host.capacity(NOW_MS)).collect()
}

fn lines(picture: &FleetPicture) -> Vec<HostLine> {
    let line = |host: &fleet::cluster::FleetHost| {
        let mut lines = BTreeMap::new();
        for entry in host.book.iter().flat_map(|book| &book.entries) {
            *lines.entry(entry.answer.name()).or_default() += 1;
        }
        let record = host.record.clone().unwrap_or_default();
        HostLine {
            host: host.host.clone(),
            there: host.is_there(),
            draining: host.drain.is_some(),
            headroom: host.capacity(NOW_MS).headroom,
            facts_age_ms: record.facts_age_ms,
            version: record.version,
            generation: record.generation,
            vms: record.vms,
            lines,
        }
    };
    picture.hosts.iter().map(line).collect()
}

fn drain_mark() -> DrainMark {
    DrainMark {
        by: who(),
        unix_ms: unix_ms(),
    }
}

/// Identifies the user in the store, so that later readers know whom to contact.
fn who() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let user = rustix::process::getuid().as_raw();
    format!("uid {user} on {}", host.trim())
}

fn unix_ms() -> u64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| {
            u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
        })
}
