//! The test cases for a fleet of real processes.

use anyhow::{Context as _, Result, bail, ensure};
use integration_tests::outcome::Outcome;
use integration_tests::wait::wait_for;
use serde_json::Value;

use super::fake_vm::FakeVm;
use super::fleet::{Answer, Fleet, HOSTS, MEMBERS, PLACES};
use super::node::DEADLINE;

/// Time limit of a placer that must succeed, seconds.
const PATIENT: u64 = 60;
/// Time limit of a placer that must fail, seconds.
const HASTY: u64 = 4;

/// Requests more places than exist: exactly the existing number of requests must succeed.
fn sell_out(fleet: &Fleet, name: &str, placers: usize) -> Result<Vec<String>> {
    let all: Vec<Vec<String>> = (0..placers)
        .map(|number| fleet.place(&format!("{name}-{number}"), PATIENT))
        .collect();
    let answers = fleet.ask_many(&all)?;
    fleet.check_nothing_oversold()?;
    let placed = ids(&answers);
    let refused = answers.iter().filter(|answer| answer.code == 3).count();
    ensure!(
        (placed.len(), refused) == (HOSTS * PLACES, placers - HOSTS * PLACES),
        "{} placed, {refused} refused: {}",
        placed.len(),
        tellings(&answers)
    );
    for host in 0..HOSTS {
        ensure!(
            fleet.held(host)? == Some(PLACES),
            "h{host} has a place left"
        );
    }
    Ok(placed)
}

fn ids(answers: &[Answer]) -> Vec<String> {
    let placed = answers.iter().filter(|answer| answer.code == 0);
    placed
        .filter_map(|answer| answer.value["id"].as_str().map(str::to_owned))
        .collect()
}

fn tellings(answers: &[Answer]) -> String {
    let odd = answers
        .iter()
        .filter(|answer| ![0, 3].contains(&answer.code));
    let told: Vec<String> = odd
        .map(|answer| format!("{}: {}", answer.code, answer.told))
        .collect();
    told.join("; ")
}

fn release(fleet: &Fleet, ids: &[String]) -> Result<()> {
    let all: Vec<Vec<String>> = ids
        .iter()
        .map(|id| {
            ["release", id, "--timeout", "60"]
                .map(str::to_owned)
                .to_vec()
        })
        .collect();
    for answer in fleet.ask_many(&all)? {
        // A reservation that already expired counts as released.
        let gone = answer.told.contains("no host holds");
        ensure!(answer.code == 0 || gone, "release: {}", answer.told);
    }
    Ok(())
}

pub(crate) fn hundred_placers_for_ten_places_get_exactly_ten(fleet: &mut Fleet) -> Result<Outcome> {
    let placed = sell_out(fleet, "many", 100)?;
    release(fleet, &placed)?;
    fleet.settle()?;
    Ok(Outcome::Passed)
}

pub(crate) fn placed_vm_that_starts_takes_its_promise_over(fleet: &mut Fleet) -> Result<Outcome> {
    let placed = fleet.place_one("web", PATIENT)?;
    ensure!(placed.code == 0, "{}", placed.told);
    let host: usize = placed.value["host"]
        .as_str()
        .and_then(|name| name.strip_prefix('h')?.parse().ok())
        .context("the host has a name")?;
    let _vm = FakeVm::start(&fleet.folder_of(host).join("web.sock"), fleet.size);
    wait_for("the VM to be seen by all", DEADLINE, || {
        let hosts = fleet.hosts()?;
        let host = &hosts[host];
        Ok((host["vms"] == 1 && host["lines"] == serde_json::json!({})).then_some(()))
    })?;
    let name = format!("h{host}");
    let drained = fleet.ask(&["drain", &name])?;
    ensure!(drained.code == 0, "drain: {}", drained.told);
    let moves = &drained.value["hosts"][&name]["moves"];
    ensure!(
        moves[0]["vm"] == "web" && moves[0]["to"] != name.as_str(),
        "drain says {}",
        drained.value
    );
    // Every other place is taken; the drained host's places are not.
    let names: Vec<Vec<String>> = (0..20)
        .map(|number| fleet.place(&format!("other-{number}"), PATIENT))
        .collect();
    let answers = fleet.ask_many(&names)?;
    let others = ids(&answers);
    ensure!(
        others.len() == (HOSTS - 1) * PLACES,
        "{} placed beside a drained host: {}",
        others.len(),
        tellings(&answers)
    );
    let undone = fleet.ask(&["drain", &name, "--undo"])?;
    ensure!(undone.code == 0, "drain --undo: {}", undone.told);
    let last = fleet.place_one("last", PATIENT)?;
    ensure!(last.value["host"] == name.as_str(), "{last:?}");
    let advice = fleet.ask(&["advice"])?;
    ensure!(
        advice.value["note"]
            .as_str()
            .is_some_and(|note| note.contains("advice only")),
        "advice says {advice:?}"
    );
    release(fleet, &[others, ids(&[last])].concat())?;
    // The running VM's reservation would end with it after a while; it is released explicitly so that the next case
    // need not wait.
    let held = fleet.local(host, &["reservations"])?.unwrap_or_default();
    let id = held[0]["id"]
        .as_str()
        .context("web is reserved")?
        .to_owned();
    fleet.local(host, &["release", &id])?;
    Ok(Outcome::Passed)
}

/// Requests several places concurrently, and checks that none is reserved twice.
fn place_some(fleet: &Fleet, name: &str, count: usize, seconds: u64) -> Result<Vec<Answer>> {
    let all: Vec<Vec<String>> = (0..count)
        .map(|number| fleet.place(&format!("{name}-{number}"), seconds))
        .collect();
    let answers = fleet.ask_many(&all)?;
    fleet.check_nothing_oversold()?;
    Ok(answers)
}

pub(crate) fn members_that_die_and_stall_cost_nothing_but_time(
    fleet: &mut Fleet,
) -> Result<Outcome> {
    for member in 0..MEMBERS {
        fleet.members[member].kill()?;
        let killed = place_some(fleet, &format!("killed-{member}"), 2, PATIENT)?;
        fleet.start_member(member)?;
        let stalled = (member + 1) % MEMBERS;
        fleet.members[stalled].stop(true)?;
        let stopped = place_some(fleet, &format!("stopped-{member}"), 2, PATIENT)?;
        fleet.members[stalled].stop(false)?;
        let all = [ids(&killed), ids(&stopped)].concat();
        // Every placer could reach a majority for most of a minute.
        ensure!(
            all.len() == 4,
            "{} of 4 placed: {} {}",
            all.len(),
            tellings(&killed),
            tellings(&stopped)
        );
        release(fleet, &all)?;
    }
    fleet.settle()?;
    let placed = sell_out(fleet, "after", 15)?;
    release(fleet, &placed)?;
    Ok(Outcome::Passed)
}

pub(crate) fn agents_that_die_and_stall_keep_their_word(fleet: &mut Fleet) -> Result<Outcome> {
    let before = sell_out(fleet, "before", 15)?;
    // One agent is killed and restarted immediately: its reservations are on its disk.
    fleet.agents[0].kill()?;
    fleet.start_agent(0)?;
    fleet.wait_status("back", 0, |_| true)?;
    ensure!(
        fleet.held(0)? == Some(PLACES),
        "a restarted agent has forgotten its promises"
    );
    // One agent is killed and one stopped while other clients send requests: no memory is reserved twice.
    fleet.agents[1].kill()?;
    fleet.agents[2].stop(true)?;
    for answer in place_some(fleet, "meanwhile", 4, HASTY)? {
        ensure!(answer.code != 0, "a place that was sold: {answer:?}");
    }
    gone(fleet, "h1")?;
    gone(fleet, "h2")?;
    fleet.agents[2].stop(false)?;
    fleet.start_agent(1)?;
    // Both return with their reservations, which can be released.
    for host in [1, 2] {
        fleet.wait_status("in step again", host, |status| {
            status["store"]["registered"] == true
        })?;
        ensure!(
            fleet.held(host)? == Some(PLACES),
            "h{host} has forgotten its promises"
        );
    }
    release(fleet, &before)?;
    fleet.settle()?;
    let placed = sell_out(fleet, "after", 15)?;
    release(fleet, &placed)?;
    Ok(Outcome::Passed)
}

fn gone(fleet: &Fleet, host: &str) -> Result<()> {
    wait_for(&format!("the lease of {host} to end"), DEADLINE, || {
        let hosts = fleet.hosts()?;
        Ok((!is_there(&hosts, host)).then_some(()))
    })
}

fn is_there(hosts: &[Value], name: &str) -> bool {
    hosts
        .iter()
        .any(|host| host["host"] == name && host["there"] == true)
}

pub(crate) fn whole_store_away_leaves_every_host_at_work(fleet: &mut Fleet) -> Result<Outcome> {
    for member in &fleet.members {
        member.stop(true)?;
    }
    for answer in place_some(fleet, "nowhere", 2, HASTY)? {
        ensure!(![0, 3].contains(&answer.code), "no store: {answer:?}");
    }
    for host in 0..HOSTS {
        fleet.wait_status("the store's absence", host, |status| {
            status["store"]["up"] == false && status["host"]["facts_age_ms"].as_u64() < Some(10_000)
        })?;
    }
    // It continues to admit local VMs, as far as they fit.
    let size = fleet.size.to_string();
    let mut made = Vec::new();
    for name in ["local-0", "local-1"] {
        let arguments = ["reserve", name, "--min", "1M", "--memory", &size];
        let Some(answer) = fleet.local(3, &arguments)? else {
            bail!("h3 does not admit {name} without its store");
        };
        let id = answer["reservation"]["id"].as_str();
        made.push(id.context("a reservation has an id")?.to_owned());
    }
    let arguments = ["reserve", "local-2", "--min", "1M", "--memory", &size];
    let answer = fleet.local_answer(3, &arguments)?;
    ensure!(answer.code == 3, "a third place: {answer:?}");
    for member in &fleet.members {
        member.stop(false)?;
    }
    for host in 0..HOSTS {
        fleet.wait_status("in step again", host, |status| {
            status["store"]["registered"] == true
        })?;
    }
    // Memory that it reserved locally is not reserved for others.
    let rest = place_some(fleet, "rest", 12, PATIENT)?;
    let placed = ids(&rest);
    ensure!(
        placed.len() <= (HOSTS - 1) * PLACES
            && rest.iter().all(|answer| answer.value["host"] != "h3"),
        "what h3 had sold was sold again: {rest:?}"
    );
    for id in &made {
        fleet
            .local(3, &["release", id])?
            .context("h3 gives its own promise back")?;
    }
    release(fleet, &placed)?;
    fleet.settle()?;
    Ok(Outcome::Passed)
}

pub(crate) fn what_is_cut_off_comes_back_in_step(fleet: &mut Fleet) -> Result<Outcome> {
    if let Err(why) = &fleet.network {
        return Ok(Outcome::Skipped(why.clone()));
    }
    // Cuts off a member: the others are the majority.
    fleet.members[0].cut(true)?;
    let one = place_some(fleet, "minority", 2, PATIENT)?;
    ensure!(ids(&one).len() == 2, "{}", tellings(&one));
    fleet.members[0].cut(false)?;
    // Cuts off a host: it keeps its reservations, its lease ends, and nothing is placed there.
    let held = place_some(fleet, "held", HOSTS * PLACES - 2, PATIENT)?;
    let all = [ids(&one), ids(&held)].concat();
    ensure!(all.len() == HOSTS * PLACES, "{}", tellings(&held));
    fleet.agents[4].cut(true)?;
    gone(fleet, "h4")?;
    let meanwhile = place_some(fleet, "meanwhile", 3, HASTY)?;
    ensure!(ids(&meanwhile).is_empty(), "{meanwhile:?}");
    fleet.agents[4].cut(false)?;
    wait_for("h4 to be back", DEADLINE, || {
        fleet.check_nothing_oversold()?;
        Ok(is_there(&fleet.hosts()?, "h4").then_some(()))
    })?;
    release(fleet, &all)?;
    fleet.settle()?;
    // Cuts off the majority: nothing can be placed, all agents keep running, and afterwards the state is as before.
    fleet.members[1].cut(true)?;
    fleet.members[2].cut(true)?;
    for answer in place_some(fleet, "no-majority", 2, HASTY)? {
        ensure!(![0, 3].contains(&answer.code), "no majority: {answer:?}");
    }
    fleet.members[1].cut(false)?;
    fleet.members[2].cut(false)?;
    fleet.settle()?;
    let placed = sell_out(fleet, "after", 15)?;
    release(fleet, &placed)?;
    Ok(Outcome::Passed)
}
