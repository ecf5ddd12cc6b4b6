// The architecture as a living picture. Drawn once; afterwards only what changes is touched.

import { age, s } from "./dom.js";

const NODES = [
  // id, x, y, width, title, service names in the health list, role of its leases
  ["cloud", 10, 160, 170, "customer's KMS", ["customercloud"], null],
  ["keymanager", 240, 160, 160, "keymanager", ["keymanager", "keymanager-2", "keymanager-3"], null],
  ["client", 470, 20, 90, "psql", [], null],
  ["proxy", 590, 20, 120, "proxy", ["proxy"], "proxy"],
  ["compute", 760, 20, 220, "compute: Postgres", ["compute"], "compute"],
  ["safekeeper-1", 590, 135, 130, "safekeeper 1", ["safekeeper-1"], "safekeeper"],
  ["safekeeper-2", 725, 135, 130, "safekeeper 2", ["safekeeper-2"], "safekeeper"],
  ["safekeeper-3", 860, 135, 130, "safekeeper 3", ["safekeeper-3"], "safekeeper"],
  ["pageserver", 590, 255, 200, "pageserver", ["pageserver"], "pageserver"],
  ["objects", 820, 345, 160, "object store", [], null],
];
const EDGES = [
  // id, path, the services at its ends, whose links may be cut: by the beginnings of their names
  ["kms", "M180 200 H240", "customercloud", "keymanager"], ["leases", "M400 190 H590", "keymanager", "safekeeper"],
  ["leases-pageserver", "M400 220 L590 280", "keymanager", "pageserver"], ["leases-front", "M320 160 V118 H740 L780 100", "keymanager", "compute proxy"],
  ["sql", "M560 55 H590"], ["session", "M710 55 H760", "proxy", "compute"], ["wal", "M870 100 V135", "compute", "safekeeper"],
  ["ingest", "M725 215 L700 255", "safekeeper", "pageserver"], ["pages", "M790 270 H995 V60 H980", "pageserver", "compute"], ["layers", "M790 310 L820 370"],
];
const LEASES = { leases: ["safekeeper"], "leases-pageserver": ["pageserver"], "leases-front": ["compute", "proxy"] };
const HEIGHT = 75;
const nodes = new Map();
const edges = new Map();

export function build(svg) {
  svg.append(s("line", { class: "boundary", x1: 205, y1: 10, x2: 205, y2: 420 }),
    label(100, 420, "the customer's side", "sub"), label(300, 420, "Keylake's side", "sub"), cuts);
  for (const [id, path] of EDGES) {
    const edge = s("path", { class: "edge", id: `edge-${id}`, d: path });
    edges.set(id, edge);
    svg.append(edge);
  }
  for (const [id, x, y, width, title] of NODES) {
    const lines = [0, 1, 2].map((line) => label(x + 10, y + 36 + 15 * line, "", "sub", "start"));
    const [ringX, ringY] = [x + width - 15, y + HEIGHT - 10];
    const left = s("circle", { class: "left", cx: ringX, cy: ringY, r: 8, "stroke-dasharray": "0 100", transform: `rotate(-90 ${ringX} ${ringY})` });
    const group = s("g", { class: "node", id: `node-${id}` },
      s("rect", { x, y, width, height: HEIGHT + 5, rx: 8 }), label(x + 10, y + 20, title, "title", "start"), ...lines,
      s("circle", { class: "ring", cx: ringX, cy: ringY, r: 8, visibility: "hidden" }), left);
    nodes.set(id, { group, lines, left, ring: group.querySelector(".ring") });
    svg.append(group);
  }
}

function label(x, y, text, kind, anchor = "middle") {
  const element = s("text", { x, y, class: kind, "text-anchor": anchor });
  element.textContent = text;
  return element;
}

const cuts = label(220, 390, "", "cut", "start");
let before = {};

export function update(svg, snapshot) {
  const health = new Map(snapshot.health.map((each) => [each.name, each.health]));
  const value = (name) => snapshot.parts[name]?.value;
  const keymanager = value("keymanager");
  const spoken = [];
  for (const [id, , , , title, services, role] of NODES) {
    const node = nodes.get(id);
    const present = services.filter((service) => health.has(service));
    const down = present.length > 0 && present.every((service) => health.get(service) === "down");
    const leases = (keymanager?.leases ?? []).filter((lease) => lease.role === role && (role !== "safekeeper" || lease.node_id === id));
    const least = leases.length ? Math.min(...leases.map((lease) => lease.remaining_s)) : null;
    const held = leases.length > 0 || (id === "keymanager" && keymanager?.plaintext_keks.length > 0);
    node.group.setAttribute("class", `node ${down ? "down" : held ? "held" : ""}`);
    ring(node, least, keymanager?.lease_ttl_s);
    const texts = down ? ["down"] : describe(id, { health, value, keymanager, leases, least, snapshot });
    node.lines.forEach((line, index) => { line.textContent = texts[index] ?? ""; });
    spoken.push(`${title}: ${texts.filter(Boolean).join(", ") || "well"}`);
  }
  flow(value);
  const told = cut(snapshot.links?.value ?? []);
  cuts.textContent = told;
  if (told) spoken.push(told);
  svg.setAttribute("aria-label", spoken.join("; "));
}

function ring(node, least, ttl) {
  node.ring.setAttribute("visibility", least === null ? "hidden" : "visible");
  const around = 2 * Math.PI * 8;
  const share = least === null || !ttl ? 0 : Math.max(0, Math.min(1, least / ttl));
  node.left.setAttribute("stroke-dasharray", `${share * around} ${around}`);
}

function describe(id, { value, keymanager, leases, least, snapshot }) {
  const lease = least === null ? null : `${leases.length} lease${leases.length > 1 ? "s" : ""}: ${least.toFixed(1)} s`;
  switch (id) {
    case "cloud": {
      const keys = value("cloud")?.keys;
      return keys ? [`${keys.length} keys`, keys.filter((key) => key.state !== "Enabled").map((key) => key.state)[0]] : ["the CMK never leaves it"];
    }
    case "keymanager":
      if (!keymanager) return ["leases: not for this role"];
      return [`${keymanager.plaintext_keks.length} KEKs in memory`, `${keymanager.leases.length} leases given out`, `leader: ${keymanager.node_id}`];
    case "compute": {
      const endpoints = value("endpoints");
      if (!endpoints) return [snapshot.parts.endpoints?.denied ? "not for this role" : null, lease];
      const running = endpoints.filter((endpoint) => endpoint.state === "RUNNING");
      const oldest = running.map((endpoint) => endpoint.boot_key_made_at).sort()[0];
      return [`${running.length} of ${endpoints.length} running`, lease, oldest ? `oldest boot key: ${age(oldest, snapshot.at)}` : "no boot key"];
    }
    case "safekeeper-1": case "safekeeper-2": case "safekeeper-3": {
      const status = value("safekeepers")?.[Number(id.at(-1)) - 1];
      return [status ? `WAL to ${newest(status.timelines, "flush_lsn")}` : null, lease];
    }
    case "pageserver": {
      const status = value("pageserver");
      return [status ? `WAL to ${newest(status.timelines, "last_record_lsn")}` : null, lease, status ? `${status.pages_served} pages, ${status.redo_workers.length} redo workers` : null];
    }
    case "objects": {
      const timelines = value("pageserver")?.timelines;
      if (!timelines) return ["sealed layers"];
      const bytes = timelines.reduce((sum, each) => sum + each.layer_size_bytes, 0);
      return [`${timelines.reduce((sum, each) => sum + each.layers, 0)} sealed layers`, `${(bytes / 1048576).toFixed(1)} MiB`];
    }
    case "proxy": return [lease];
    default: return [];
  }
}

function number(lsn) {
  const [high, low] = lsn.split("/");
  return parseInt(high, 16) * 2 ** 32 + parseInt(low, 16);
}

function newest(timelines, field) {
  const found = timelines.map((each) => each[field]).filter(Boolean);
  return found.length ? found.reduce((a, b) => (number(a) > number(b) ? a : b)) : "–";
}

// Over what flows: nothing does there. In words, too, and those say which of an edge's links they are.
function cut(links) {
  const found = links.filter((link) => link.cut).map((link) => link.between);
  for (const [id, , one, others] of EDGES) {
    const here = one && found.some((pair) => [pair, [...pair].reverse()].some(([a, b]) => a.startsWith(one) && others.split(" ").some((other) => b.startsWith(other))));
    if (here) edges.get(id).setAttribute("class", "edge cut");
  }
  return found.length > 3 ? `cut: ${found.length} links` : found.length ? `cut: ${found.map((pair) => pair.join(" from ")).join(", ")}` : "";
}

function flow(value) {
  const now = {
    wal: JSON.stringify(value("safekeepers")?.map((each) => each?.timelines.map((t) => t.flush_lsn))),
    ingest: JSON.stringify(value("pageserver")?.timelines.map((t) => t.last_record_lsn)),
    pages: value("pageserver")?.pages_served,
    layers: JSON.stringify(value("pageserver")?.timelines.map((t) => t.layers)),
  };
  for (const [id, edge] of edges) {
    const moving = id in now ? now[id] !== undefined && before[id] !== undefined && now[id] !== before[id]
      : (value("keymanager")?.leases ?? []).some((lease) => LEASES[id]?.includes(lease.role));
    edge.setAttribute("class", moving ? "edge flow" : "edge");
  }
  before = now;
}
