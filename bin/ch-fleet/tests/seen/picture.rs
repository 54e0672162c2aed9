//! Takes a picture of the page of an agent with real guests: `cargo xtask demo --fleet --picture FILE`.

use std::env;
use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use super::browser::Browser;
use super::host::http_get;

/// Long enough for an emulated host to boot and its guests to have some turns, on a busy machine.
const DEADLINE: Duration = Duration::from_secs(600);
const INTERVAL: Duration = Duration::from_millis(250);
/// Waits for enough points in the chart; a point is added every two seconds.
const STEPS: &str =
    "document.querySelector('#chart path.resident')?.getAttribute('d').split('L').length ?? 0";
const STEPS_MIN: u64 = 45;
/// The line of each VM in the chart.
const LINES: &str = "[...document.querySelectorAll('#vms tr')].map(tr => tr.querySelector('path').getAttribute('d'))";

fn wait(what: &str, mut condition: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < DEADLINE, "{what}: not in time");
        thread::park_timeout(INTERVAL);
    }
}

#[test]
#[ignore = "needs a fleet: cargo xtask demo --fleet --picture FILE"]
fn page_of_a_real_fleet_shows_memory_going_from_guest_to_guest() {
    let address = env::var("FLEET_PAGE").expect("FLEET_PAGE names the page");
    let picture = PathBuf::from(env::var_os("FLEET_PICTURE").expect("FLEET_PICTURE names a file"));
    wait("the page", || http_get(&address, "/").is_some());
    let mut browser = Browser::start();
    browser.look(1100, 900, "light");
    browser.open(&format!("http://{address}/"));
    wait("three guests", || {
        browser.evaluate("document.querySelectorAll('#vms tr').length") == 3
    });
    wait("a chart", || {
        browser.evaluate(STEPS).as_u64() >= Some(STEPS_MIN)
    });
    let before = browser.evaluate(LINES);
    wait("every guest's line to move", || {
        let now = browser.evaluate(LINES);
        (0..3).all(|vm| now[vm] != before[vm])
    });
    assert_eq!(browser.take_complaints(), [""; 0]);
    // Renamed when complete, because the process that waits for the picture then ends the fleet.
    let beside = picture.with_extension("part");
    browser.screenshot(&beside);
    fs::rename(beside, picture).unwrap();
}
