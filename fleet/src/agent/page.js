// The page of one agent: asks every two seconds what was published, and draws it.
//
// Names and texts come from whoever runs VMs here. They are set as text, never as markup, and the agent forbids scripts
// and styles from anywhere else besides.
"use strict";

const ROUND_MS = 2000;
const ROUND_LIMIT_MS = 10000;
const SPAN_MS = 600000;
const SPAN_MS_MIN = 60000;
const VM_POINTS_MAX = 150;
const VM_POINTS_MIN = 30;
const EVENTS_MAX = 200;
const SVG = "http://www.w3.org/2000/svg";
const LINES = ["available", "resident", "ballooned", "callable"];

const $ = id => document.getElementById(id);

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function makeSvg(tag, attributes) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function size(bytes) {
  if (bytes === null || bytes === undefined) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (bytes >= 1024 && unit < units.length - 1) { bytes /= 1024; unit++; }
  return bytes.toFixed(bytes < 10 && unit > 0 ? 1 : 0) + " " + units[unit];
}

function duration(ms) {
  const seconds = Math.round(ms / 1000);
  if (seconds < 120) return seconds + " s";
  if (seconds < 7200) return Math.round(seconds / 60) + " min";
  if (seconds < 172800) return Math.round(seconds / 3600) + " h";
  return Math.round(seconds / 86400) + " days";
}

function swatch(name, text) {
  const item = make("li");
  item.append(make("i", name), text);
  return item;
}

// --- The host ---

function showHost(status) {
  const host = status.host;
  setText($("name"), host.name);
  document.title = host.name + ": " + host.state + " – ch-fleet";
  setText($("state"), host.state);
  $("state").className = "state " + host.state;
  $("state").hidden = false;
  const told = ["for " + duration(host.state_age_ms), "agent " + status.version + " since " + duration(status.unix_ms - status.started_unix_ms)];
  if (status.dry_run) told.push("dry run: nothing is changed");
  if (!status.reload_ok) told.push("the last settings were refused");
  setText($("sub"), told.join(" · "));
  showBar(host.ledger);
  showBooks(host);
}

function showBar(ledger) {
  const others = Math.max(0, ledger.usable - ledger.available - ledger.resident);
  const parts = [["VMs", "resident", ledger.resident], ["others", "others", others], ["promised", "promised", ledger.promised + ledger.granted], ["kept for bursts", "burst", ledger.burst], ["free", "free", ledger.firm_free]];
  const shown = parts.filter(part => part[2] > 0);
  $("bar").replaceChildren(...shown.map(([name, kind, bytes]) => {
    const part = make("div", kind);
    part.style.flex = bytes + " 0 0";
    part.title = name + " " + size(bytes);
    return part;
  }));
  $("parts").replaceChildren(...shown.map(([name, kind, bytes]) => swatch(kind, name + " " + size(bytes))));
}

function showBooks(host) {
  const ledger = host.ledger, pressure = host.facts.pressure;
  const figures = [
    ["usable", size(ledger.usable)],
    ["available", size(ledger.available)],
    ["free above the reserve", (host.free * 100).toFixed(0) + " %"],
    ["configured", size(ledger.configured)],
    ["resident", size(ledger.resident)],
    ["ballooned", size(ledger.ballooned)],
    ["callable", size(ledger.callable_liability)],
    ["firm free", size(ledger.firm_free)],
    ["lacking", size(host.shortage)],
    ["wanted by new VMs", size(host.wanted)],
    ["burst covered", host.burst_coverage === null ? "–" : host.burst_coverage.toFixed(1) + " ×"],
    ["pressure some", pressure.some_avg10.toFixed(1) + " %"],
    ["pressure full", pressure.full_avg10.toFixed(1) + " %"],
  ];
  $("books").replaceChildren(...figures.map(([name, value]) => {
    const tile = make("div");
    tile.append(make("dt", "", name), make("dd", "", value));
    return tile;
  }));
}

// --- The chart ---

const points = [];

// A round figure at or above `bytes`, so that the scale does not move with every round.
function roundUp(bytes) {
  let step = 1;
  while (step * 8 < bytes) step *= 2;
  return Math.max(1, Math.ceil(bytes / step) * step);
}

function showChart(status) {
  const ledger = status.host.ledger, now = status.unix_ms;
  points.push({ at: now, values: [ledger.available, ledger.resident, ledger.ballooned, ledger.callable_liability] });
  while (points[0].at < now - SPAN_MS) points.shift();
  // A page that was just opened shows what it has seen so far over its whole width.
  const span = Math.max(SPAN_MS_MIN, now - points[0].at);
  const top = roundUp(Math.max(1, ...points.flatMap(point => point.values)));
  const y = value => 195 - value / top * 180;
  const parts = [], labels = [];
  for (const quarter of [0, 0.25, 0.5, 0.75, 1]) {
    parts.push(makeSvg("line", { x1: 0, x2: 1000, y1: y(top * quarter), y2: y(top * quarter) }));
    const label = make("span", "", size(top * quarter));
    label.style.top = y(top * quarter) / 2 + "%";
    labels.push(label);
  }
  LINES.forEach((name, line) => {
    const steps = points.map((point, index) => (index ? "L" : "M") + (1000 - (now - point.at) / span * 1000).toFixed(1) + " " + y(point.values[line]).toFixed(1));
    // One point alone is drawn as a short line.
    if (steps.length === 1) steps.push("h-2");
    parts.push(makeSvg("path", { class: name, d: steps.join(""), fill: "none" }));
  });
  setText($("chart-title"), "Last " + duration(span));
  $("chart").replaceChildren(...parts);
  $("scale").replaceChildren(...labels);
  const last = points[points.length - 1].values;
  $("lines").replaceChildren(...LINES.map((name, line) => swatch(name, name + " " + size(last[line]))));
}

// --- The VMs ---

function decision(vm) {
  if (!vm.up) return vm.failure ? "no answer: " + vm.failure : "not asked yet";
  const told = [vm.reason || "–"];
  if (vm.interlock) told.push("left alone: " + vm.interlock);
  if (vm.suffering) told.push("suffers");
  if (vm.stuck) told.push("balloon stuck");
  if (!vm.trusted) told.push("not believed");
  return told.join(", ");
}

// Name, how it is shown, what it is sorted by, class of its cells.
const COLUMNS = [
  ["VM", vm => vm.vm, vm => vm.vm, "text name"],
  ["class", vm => vm.class, vm => vm.class, "text"],
  ["level", vm => "L" + vm.level, vm => vm.level, ""],
  ["configured", vm => size(vm.configured), vm => vm.configured, ""],
  ["resident", vm => size(vm.resident), vm => vm.resident, ""],
  ["course", null, null, ""],
  ["balloon asked", vm => size(vm.target), vm => vm.target, ""],
  ["balloon", vm => size(vm.actual), vm => vm.actual, ""],
  ["free inside", vm => size(vm.guest_available), vm => vm.guest_available ?? -1, ""],
  ["taken back/s", vm => size(vm.repopulated_per_s), vm => vm.repopulated_per_s, ""],
  ["age", vm => vm.sample_age_ms === null ? "–" : (vm.sample_age_ms / 1000).toFixed(1) + " s", vm => vm.sample_age_ms ?? -1, ""],
  ["last decision", decision, decision, "text long"],
];

const rows = new Map();
let sortBy = 0, descending = false, vms = [];

function makeHeads() {
  $("heads").replaceChildren(...COLUMNS.map(([name, , key, kind], index) => {
    const head = make("th", kind.includes("text") ? "text" : "");
    head.scope = "col";
    if (!key) { head.textContent = name; return head; }
    const button = make("button", "", name);
    button.type = "button";
    button.addEventListener("click", () => {
      // Figures are most wanted from the top, names from A.
      descending = sortBy === index ? !descending : kind === "";
      sortBy = index;
      arrange();
    });
    head.append(button);
    return head;
  }));
}

function makeRow() {
  const row = { tr: make("tr"), cells: [], course: [], paths: [] };
  for (const [, text, , kind] of COLUMNS) {
    const cell = make("td", kind);
    if (!text) {
      const svg = makeSvg("svg", { viewBox: "0 0 100 20", preserveAspectRatio: "none", role: "img" });
      row.paths = [makeSvg("path", { class: "ballooned", fill: "none" }), makeSvg("path", { fill: "none" })];
      svg.append(...row.paths);
      cell.append(svg);
      cell.title = "resident memory and balloon as parts of its configured memory, five minutes at most";
    }
    row.cells.push(cell);
    row.tr.append(cell);
  }
  return row;
}

function course(values, top) {
  const step = 100 / (Math.max(VM_POINTS_MIN, values.length) - 1), begin = 100 - (values.length - 1) * step;
  const steps = values.map((value, index) => (index ? "L" : "M") + (begin + index * step).toFixed(1) + " " + (19 - Math.min(1, value / top) * 18).toFixed(1));
  return steps.length === 1 ? steps[0] + "h-2" : steps.join("");
}

function fillRow(row, vm) {
  COLUMNS.forEach(([, text], index) => { if (text) setText(row.cells[index], text(vm)); });
  row.tr.className = vm.up || !vm.failure ? "" : "bad";
  row.cells[0].title = vm.vm;
  row.cells[COLUMNS.length - 1].title = vm.explanation;
  row.course.push([vm.actual, vm.resident]);
  if (row.course.length > VM_POINTS_MAX) row.course.shift();
  row.paths.forEach((path, line) => path.setAttribute("d", course(row.course.map(point => point[line]), Math.max(1, vm.configured))));
}

function showVms(status) {
  vms = status.vms;
  const here = new Set(vms.map(vm => vm.vm));
  for (const [name, row] of rows) if (!here.has(name)) { row.tr.remove(); rows.delete(name); }
  for (const vm of vms) {
    if (!rows.has(vm.vm)) rows.set(vm.vm, makeRow());
    fillRow(rows.get(vm.vm), vm);
  }
  arrange();
}

// Puts the rows in order and leaves out those that the filter does not want.
function arrange() {
  const wanted = $("filter").value.trim().toLowerCase();
  const key = COLUMNS[sortBy][2];
  const compare = (a, b) => {
    const [left, right] = [key(a), key(b)];
    return typeof left === "string" ? left.localeCompare(right, undefined, { numeric: true }) : left - right;
  };
  const fits = vm => !wanted || [vm.vm, vm.class, decision(vm)].some(text => text.toLowerCase().includes(wanted));
  const shown = vms.filter(fits).sort((a, b) => (descending ? -compare(a, b) : compare(a, b)));
  const trs = shown.map(vm => rows.get(vm.vm).tr), body = $("vms");
  // Rows that stand where they belong are left alone, with what is selected in them.
  if (trs.length !== body.children.length || trs.some((tr, index) => tr !== body.children[index])) body.replaceChildren(...trs);
  [...$("heads").children].forEach((head, index) => head.setAttribute("aria-sort", index !== sortBy ? "none" : descending ? "descending" : "ascending"));
  setText($("count"), shown.length === vms.length ? String(vms.length) : shown.length + " of " + vms.length);
}

function showReservations(status) {
  $("promises").hidden = status.reservations.length === 0;
  $("held").replaceChildren(...status.reservations.map(held => {
    const tr = make("tr");
    tr.append(make("td", "text name", held.vm), make("td", "", size(held.configured)), make("td", "", size(held.promised)), make("td", "", size(held.outstanding)), make("td", "text", held.phase));
    return tr;
  }));
}

function showStandby(status) {
  $("asleep").hidden = status.standby.length === 0;
  $("standby").replaceChildren(...status.standby.map(vm => {
    const tr = make("tr", vm.fault ? "bad" : "");
    const phase = vm.fault ? vm.fault : vm.phase;
    tr.append(make("td", "text name", vm.vm), make("td", "", size(vm.memory)), make("td", "", size(vm.disk)), make("td", "text", phase), make("td", "text", duration(status.unix_ms - vm.since_unix_ms)));
    return tr;
  }));
}

// --- Events ---

let next = 0;

function showEvents(entries) {
  const body = $("events");
  for (const entry of entries.slice(-EVENTS_MAX)) {
    const tr = make("tr"), at = new Date(entry.unix_ms);
    const time = make("td", "text", at.toLocaleTimeString(undefined, { hour12: false }));
    time.title = at.toISOString();
    const name = make("td", "text name", entry.vm);
    name.title = entry.vm;
    tr.append(time, make("td", "text", entry.kind), name, make("td", "text long", entry.text));
    body.prepend(tr);
  }
  while (body.children.length > EVENTS_MAX) body.lastChild.remove();
}

// --- Rounds ---

let started = 0;

async function get(path) {
  const answer = await fetch(path, { cache: "no-store", signal: AbortSignal.timeout(ROUND_LIMIT_MS) });
  if (!answer.ok) throw new Error(path + ": " + answer.status);
  return answer.json();
}

async function round() {
  try {
    const status = await get("status.json");
    // Another agent counts its events from the beginning.
    if (status.started_unix_ms !== started) { started = status.started_unix_ms; next = 0; }
    showHost(status);
    showChart(status);
    showVms(status);
    showReservations(status);
    showStandby(status);
    const page = await get("events.json?since=" + next);
    next = page.next;
    showEvents(page.entries);
    $("stale").hidden = true;
  } catch (error) {
    $("stale").hidden = false;
    $("stale").title = String(error);
  }
  setTimeout(round, ROUND_MS);
}

makeHeads();
$("filter").addEventListener("input", arrange);
round();
