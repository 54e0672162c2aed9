//! Tests the page in a browser.

use std::fs;
use std::path::Path;

use serde_json::Value;

use super::browser::Browser;
use super::host::Host;

/// A name that would become an element and run a script if it were interpreted as markup.
const MARKUP: &str = "<img src=x onerror=evil=1>";
const HOST_SHOWN: &str = "document.querySelectorAll('#bar div').length > 0 && document.querySelectorAll('#books dd').length > 8";
const DECIDED: &str =
    "[...document.querySelectorAll('#events tr')].some(tr => tr.textContent.includes('balloon '))";
const STALE: &str = "!document.getElementById('stale').hidden";
const FRESH: &str = "document.getElementById('stale').hidden";

fn open(host: &Host) -> Browser {
    let mut browser = Browser::start();
    browser.open(&format!("http://{}/", host.address));
    browser
}

fn names(browser: &mut Browser) -> Vec<String> {
    let names = browser
        .evaluate("[...document.querySelectorAll('#vms td.name')].map(td => td.textContent)");
    serde_json::from_value(names).unwrap()
}

fn assert_content(browser: &mut Browser) {
    browser.wait(HOST_SHOWN);
    browser.wait("document.querySelectorAll('#vms tr').length === 3");
    assert_eq!(names(browser), [MARKUP, "a", "b"]);
    // Every VM has been sampled and has a row.
    browser.wait(
        "[...document.querySelectorAll('#vms tr')].every(tr => tr.textContent.includes('4.0 GiB') && tr.querySelector('path').getAttribute('d').length > 0)",
    );
    browser.wait(DECIDED);
    browser
        .wait("['yellow', 'orange', 'red'].includes(document.getElementById('state').textContent)");
    assert_eq!(
        browser.evaluate("document.querySelectorAll('main img').length"),
        0
    );
    assert_eq!(browser.evaluate("typeof evil"), "undefined");
}

/// Waits until the chart is redrawn with more points.
fn assert_chart_goes_on(browser: &mut Browser) {
    const STEPS: &str =
        "document.querySelector('#chart path.available').getAttribute('d').split('L').length";
    assert_eq!(
        browser.evaluate("document.querySelectorAll('#chart path').length"),
        4
    );
    let before = browser.evaluate(STEPS).as_u64().unwrap();
    browser.wait(&format!("{STEPS} > {before}"));
}

#[test]
#[ignore = "needs Chromium: cargo xtask fleet-page"]
fn page_shows_the_host_its_vms_and_decisions_and_goes_on_after_a_restart() {
    let mut host = Host::start([MARKUP, "a", "b"].map(str::to_owned));
    let mut browser = open(&host);
    assert_content(&mut browser);
    assert_chart_goes_on(&mut browser);
    assert_eq!(browser.take_complaints(), [""; 0]);

    host.kill_agent();
    browser.wait(STALE);
    // The browser itself logs requests without a response.
    let complaints = browser.take_complaints();
    assert!(
        complaints
            .iter()
            .all(|text| text.contains("ERR_CONNECTION")),
        "{complaints:?}"
    );
    let before = browser.evaluate(
        "[...document.querySelectorAll('#events tr')].filter(tr => tr.textContent.includes('started')).length",
    );
    assert_eq!(before, 1);
    host.start_agent();
    browser.wait(FRESH);
    browser.wait(
        "[...document.querySelectorAll('#events tr')].filter(tr => tr.textContent.includes('started')).length === 2",
    );
    browser.take_complaints();
    assert_content(&mut browser);
    assert_chart_goes_on(&mut browser);
    assert_eq!(browser.take_complaints(), [""; 0]);
}

#[test]
#[ignore = "needs Chromium: cargo xtask fleet-page"]
fn page_with_200_vms_fits_every_window_and_is_sorted_and_filtered() {
    let host = Host::start((0..200).map(|number| format!("vm-{number}")));
    let mut browser = open(&host);
    browser.look(1280, 900, "light");
    browser.wait(HOST_SHOWN);
    browser.wait("document.querySelectorAll('#vms tr').length === 200");
    browser.wait("document.querySelectorAll('#vms tr')[199].textContent.includes('4.0 GiB')");
    // vm-10 follows vm-9, not vm-1.
    assert_eq!(names(&mut browser)[9..11], ["vm-9", "vm-10"]);
    // Waits for decisions, so that the picture shows a busy page.
    browser.wait(DECIDED);
    browser.wait("document.querySelector('#chart path').getAttribute('d').split('L').length > 3");
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("page");
    fs::create_dir_all(&folder).unwrap();
    let mut backs: Vec<Value> = Vec::new();
    for (name, width, height, scheme) in [
        ("wide-light", 1280, 1000, "light"),
        ("wide-dark", 1280, 1000, "dark"),
        ("narrow", 390, 844, "light"),
    ] {
        browser.look(width, height, scheme);
        assert_eq!(
            browser.evaluate("document.documentElement.scrollWidth <= innerWidth"),
            true,
            "{name}: wider than its window"
        );
        backs.push(browser.evaluate("getComputedStyle(document.body).backgroundColor"));
        browser.screenshot(&folder.join(format!("{name}.png")));
    }
    assert_ne!(backs[0], backs[1]);

    browser.look(1280, 900, "light");
    let filter = "{ const filter = document.getElementById('filter'); filter.value = 'VM-19'; filter.dispatchEvent(new Event('input')); }";
    browser.evaluate(filter);
    assert_eq!(names(&mut browser).len(), 11);
    assert_eq!(
        browser.evaluate("document.getElementById('count').textContent"),
        "11 of 200"
    );
    browser.evaluate("document.querySelector('#heads th button').click()");
    assert_eq!(names(&mut browser)[0], "vm-199");
    assert_eq!(
        browser.evaluate("document.querySelector('#heads th').ariaSort"),
        "descending"
    );
    browser.evaluate("document.getElementById('events-title').scrollIntoView()");
    browser.screenshot(&folder.join("events.png"));
    assert_eq!(browser.take_complaints(), [""; 0]);
}
