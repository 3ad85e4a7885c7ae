"use strict";
// Everything shown may come from elsewhere (a process's title): it goes into the page as text, never as markup.

const EVERY_MS = 2000;
const GAP_S = 15; // points farther apart than this are not joined
const MOST_ROWS = 500;
const WIDTH = 1000, HEIGHT = 100;

function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "title"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children); // what is no element becomes a text node
  return element;
}

function byId(id) {
  return document.getElementById(id);
}

function duration(ms) {
  const seconds = ms / 1000;
  if (seconds < 60) return seconds.toFixed(1) + " s";
  const two = (n) => String(Math.floor(n)).padStart(2, "0");
  return Math.floor(seconds / 3600) + ":" + two((seconds / 60) % 60) + ":" + two(seconds % 60);
}

function cellText(column, value) {
  if (value === null || value === undefined) return "–";
  if (column.endsWith("_ms")) return duration(value);
  if (typeof value === "boolean") return value ? "yes" : "";
  return String(value);
}

// A table of whatever fields the rows have.
function fillTable(table, rows) {
  const columns = rows.length ? Object.keys(rows[0]) : [];
  const numeric = new Set(columns.filter((column) => rows.every((row) => row[column] === null || typeof row[column] === "number")));
  const cells = (tag, text) => columns.map((column) => make(tag, numeric.has(column) ? { class: "number" } : {}, text(column)));
  const head = make("tr", {}, ...cells("th", (column) => column.replace(/_ms$/, "").replaceAll("_", " ")));
  const body = rows.slice(0, MOST_ROWS).map((row) => make("tr", {}, ...cells("td", (column) => cellText(column, row[column]))));
  table.replaceChildren(make("thead", {}, head), make("tbody", {}, ...body));
}

function figure(name, value, alarm = false) {
  return make("div", {}, make("dt", {}, name), make("dd", alarm ? { class: "alarm" } : {}, value));
}

// Points are [seconds ago, in use, leases, waiting, limit], the oldest first.
function chart(points) {
  const span = Math.max(60, points[0][0]);
  const top = Math.max(1, ...points.map((point) => Math.max(point[2], point[3], point[4])));
  const x = (age) => (WIDTH * (1 - age / span)).toFixed(1);
  const y = (count) => (HEIGHT * (1 - (0.95 * count) / top)).toFixed(1);
  const runs = [];
  let before = Infinity;
  for (const point of points) {
    if (before - point[0] > GAP_S) runs.push([]);
    runs.at(-1).push(point);
    before = point[0];
  }
  const line = (run, index) => run.map((point) => x(point[0]) + " " + y(point[index])).join(" L ");
  const area = (index) =>
    runs.map((run) => `M ${x(run[0][0])} ${HEIGHT} L ${line(run, index)} L ${x(run.at(-1)[0])} ${HEIGHT} Z`).join(" ");
  const limit = points.at(-1)[4];
  const picture = make(
    "svg",
    { class: "chart", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" },
    make("title", {}, `${points.at(-1)[1]} of ${limit} in use now`),
    make("path", { class: "kept", d: area(2) }),
    make("path", { class: "used", d: area(1) }),
    make("line", { class: "limit", x1: 0, x2: WIDTH, y1: y(limit), y2: y(limit) }),
    make("path", { class: "waiting", d: runs.map((run) => "M " + line(run, 3)).join(" ") }),
  );
  const legend = make(
    "div",
    { class: "legend" },
    make("span", { class: "span" }, span < 120 ? `the last ${Math.round(span)} s` : `the last ${Math.round(span / 60)} min`),
    make("span", { class: "used" }, "in use"),
    make("span", { class: "kept" }, "idle, or on its way"),
    make("span", { class: "waiting" }, "waiting"),
    make("span", { class: "limit" }, `limit ${limit}`),
  );
  return [picture, legend];
}

function poolSection(pool, history) {
  const now = [0, pool.in_use, pool.leases, pool.waiting, pool.max_conn];
  const unsure = pool.suspect + pool.fencing;
  const figures = make(
    "dl",
    { class: "figures" },
    figure("in use", `${pool.in_use} of ${pool.max_conn}`),
    figure("idle", pool.idle),
    figure("waiting", pool.waiting, pool.waiting > 0),
    figure("opening, closing", pool.granted + pool.closing),
    figure("suspect, being ended", unsure, unsure > 0),
    figure("processes", pool.sessions),
    figure("recalls", pool.recalls),
    figure("hand-overs", pool.handovers),
    figure("timeouts", pool.timeouts),
    figure("fences", pool.fences),
  );
  const heading = make("h2", {}, pool.name + " ", make("span", {}, pool.server));
  const error = pool.error ? [make("p", { class: "error" }, "cannot open connections: " + pool.error)] : [];
  return make("section", { class: "pool" }, heading, ...error, figures, ...chart([...(history ?? []), now]));
}

function show(status) {
  const report = status.report;
  const cap = report.max_conn ? `${report.leases} of ${report.max_conn} over all pools` : `${report.leases} leases`;
  byId("broker").textContent =
    `broker ${report.pid} at ${report.address}, ${report.state}, up ${duration(report.uptime_ms)}, epoch ${report.epoch};` +
    ` ${cap}; control connection: ${report.control}`;
  document.title = `sharedpool: ${report.leases} leases`;
  byId("pools").replaceChildren(...report.pools.map((pool) => poolSection(pool, status.history[pool.name])));
  const counted = (rows) => rows.length + (rows.length > MOST_ROWS ? `, the first ${MOST_ROWS} of which are shown` : "");
  byId("lease-count").textContent = counted(status.leases);
  byId("session-count").textContent = counted(report.sessions);
  byId("host-section").hidden = !report.hosts.length;
  fillTable(byId("hosts"), report.hosts.map((host) => ({ ...host, host: host.host || "this one", pool: host.pool || "all pools" })));
  fillTable(byId("leases"), status.leases);
  fillTable(byId("sessions"), report.sessions);
}

let since = "";

async function poll() {
  const trouble = byId("trouble");
  try {
    const answer = await fetch("status.json", { signal: AbortSignal.timeout(5000) });
    if (!answer.ok) throw new Error(await answer.text());
    show(await answer.json());
    trouble.hidden = true;
  } catch (error) {
    if (trouble.hidden) since = new Date().toLocaleTimeString();
    trouble.textContent = `no news since ${since}: ${error.message}`;
    trouble.hidden = false;
  }
  setTimeout(poll, EVERY_MS);
}

poll();
