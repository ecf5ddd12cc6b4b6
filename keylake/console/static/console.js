// The page: one hat, one stream, everything else follows from what it brings.

import { get, post, stream, upload } from "./api.js";
import * as diagram from "./diagram.js";
import { draw, h, table, toast } from "./dom.js";
import * as panels from "./panels.js";
import * as tour from "./tour.js";

const HATS = [["customer", "customer"], ["account-admin", "account admin"], ["security-admin", "security admin"], ["second-security-admin", "second security admin"],
  ["workspace-admin", "workspace admin"], ["data-user", "data user"], ["auditor", "auditor"], ["operator", "operator"]];
const at = (id) => document.getElementById(id);
const svg = at("diagram");
const viewing = { hat: null, stop: () => {}, snapshot: null };

export function wear(hat) {
  viewing.stop();
  viewing.hat = hat;
  panels.setHat(hat);
  sessionStorage.setItem("hat", hat);
  at("hats").querySelector(`[value="${hat}"]`).checked = true;
  viewing.stop = stream(hat, show, connected);
}

function connected(word) {
  const box = at("connection");
  box.textContent = word;
  box.classList.toggle("bad", word !== "live");
}

function show(snapshot) {
  if (snapshot.error) { connected(snapshot.error); return; }
  if (snapshot.hat !== viewing.hat) return;
  viewing.snapshot = snapshot;
  diagram.update(svg, snapshot);
  panels.keys(at("keys").querySelector(".body"), snapshot.parts);
  panels.customer(at("customer"), snapshot.parts);
  panels.network(at("network"), snapshot.links);
  panels.revocations(at("revocations").querySelector(".body"), snapshot.parts);
  panels.ages(snapshot.at);
  endpoints(snapshot.parts.endpoints?.value);
  tour.seen(snapshot);
}

function endpoints(found) {
  if (!found) return;
  const select = at("sql-endpoint");
  const chosen = select.value;
  draw(select, found.map((each) => [each.endpoint_id, each.name, each.project_id]), () =>
    found.map((each) => h("option", { value: each.endpoint_id }, `${each.name} (${each.endpoint_id})`)));
  if (chosen) select.value = chosen;
}

at("hats").append(...HATS.map(([value, words]) => h("label", {},
  h("input", { type: "radio", name: "hat", value, onchange: () => wear(value) }), words)));

at("sql-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const button = event.submitter ?? at("sql-form").querySelector("button");
  button.disabled = true;
  const box = at("sql-result");
  box.replaceChildren("running … (a compute that sleeps is woken first)");
  try {
    const answer = await post("sql", { hat: viewing.hat, endpoint_id: at("sql-endpoint").value, sql: at("sql-text").value });
    box.replaceChildren(...answer.error
      ? [h("p", {}, h("strong", {}, answer.sqlstate ? `SQLSTATE ${answer.sqlstate} ` : ""), answer.error), ...(answer.details ?? []).map((each) => h("p", {}, each))]
      : [answer.columns.length ? table(answer.columns, answer.rows, "Result") : h("p", {}, answer.status), answer.more ? h("p", {}, "… and more rows") : ""]);
  } catch (error) {
    box.replaceChildren(h("p", { class: "refused" }, error.message));
  }
  button.disabled = false;
  tour.ran(box.textContent);
});
at("sql-text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("sql-form").requestSubmit();
});

at("receipt-file").addEventListener("change", async (event) => {
  const [file] = event.target.files;
  if (!file) return;
  const box = at("receipt-result");
  try {
    const told = await upload("verify", file);
    box.replaceChildren(h("p", {}, h("strong", {}, "Genuine. "), `Signed by ${told.signed_by}, ${told.issued_at}. ${told.headline}`),
      h("ul", {}, told.verified.map((each) => h("li", {}, `verified: ${each}`)), told.not_verified.map((each) => h("li", {}, `not verified: ${each}`))));
  } catch (error) {
    box.replaceChildren(h("p", { class: "refused" }, h("strong", {}, "Not genuine: "), error.message));
  }
  event.target.value = ""; // the same file may be chosen again
});

// --- what is stored ---

function hexdump({ name, size_bytes: size, offset, hex }) {
  const bytes = hex.match(/../g)?.map((pair) => parseInt(pair, 16)) ?? [];
  const lines = [`${name}   ${size} bytes`];
  for (let i = 0; i < bytes.length; i += 16) {
    const row = bytes.slice(i, i + 16);
    const text = row.map((byte) => (byte >= 32 && byte < 127 ? String.fromCharCode(byte) : ".")).join("");
    lines.push(`${(offset + i).toString(16).padStart(8, "0")}  ${row.map((byte) => byte.toString(16).padStart(2, "0")).join(" ").padEnd(48)} ${text}`);
  }
  return lines.join("\n");
}

const WINDOW = 1024; // WINDOW_SIZE_BYTES of keylake/console/stored.py
let shown = null;

async function look(name, offset = 0) {
  try {
    shown = await get("file", { name, offset });
    at("stored-hex").textContent = hexdump(shown);
    at("stored-before").disabled = offset === 0;
    at("stored-after").disabled = end(shown) >= shown.size_bytes;
  } catch (error) { toast(error.message); }
}

const end = ({ offset, hex }) => offset + hex.length / 2;
at("stored-before").addEventListener("click", () => look(shown.name, Math.max(0, shown.offset - WINDOW)));
at("stored-after").addEventListener("click", () => look(shown.name, end(shown)));

async function list() {
  try {
    const files = await get("files");
    at("stored-list").replaceChildren(table(["file", "bytes", "changed"], files.map((file) => [
      h("button", { type: "button", onclick: () => look(file.name) }, file.name), String(file.size_bytes), new Date(file.modified_at * 1000).toLocaleTimeString()]), "Files"));
    if (files.length) await look(files[0].name);
  } catch (error) { toast(error.message); }
}
at("stored-refresh").addEventListener("click", list);
at("stored-find").addEventListener("change", async (event) => {
  const word = event.target.value;
  if (!word) return;
  try {
    const { files, bytes, hits } = await post("find", { word });
    at("stored-hex").textContent = hits.length
      ? `FOUND in ${hits.length} of ${files} files:\n${hits.join("\n")}`
      : `not found: ${files} files, ${bytes} bytes searched, in UTF-8 and UTF-16`;
  } catch (error) { toast(error.message); }
});

// --- both logs ---

let logs = [];
at("logs-open").addEventListener("click", () => {
  const open = !logs.length;
  at("logs-body").hidden = !open;
  at("logs-open").setAttribute("aria-expanded", String(open));
  at("logs-open").textContent = open ? "Hide them" : "Show them";
  if (open) {
    logs = [stream("auditor", (each) => each.parts && panels.ours(at("log-ours"), each.parts.audit), () => {}),
      stream("customer", (each) => each.parts && panels.theirs(at("log-theirs"), each.parts.cloud), () => {})];
  } else {
    logs.forEach((stop) => stop());
    logs = [];
  }
});

diagram.build(svg);
tour.prepare({ wear, list });
wear(HATS.some(([value]) => value === sessionStorage.getItem("hat")) ? sessionStorage.getItem("hat") : "auditor");
