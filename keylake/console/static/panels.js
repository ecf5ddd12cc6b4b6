// Keys and data, the customer's cloud, revocations, both logs: what the snapshot of a hat holds, as tables and buttons.

import { download, post } from "./api.js";
import { age, draw, h, s, state, table, toast } from "./dom.js";

let hat = "auditor";
export function setHat(value) { hat = value; }

const security = () => hat === "security-admin" || hat === "second-security-admin";

// `more`: asked for at the click, as it then is.
function act(action, target, words, kind = "", more = () => ({})) {
  return h("button", {
    type: "button", class: kind, "data-key": `${action}:${target}`, "data-action": action,
    onclick: async (event) => {
      const button = event.currentTarget; // not `disabled` meanwhile: that would take the focus away
      if (button.hasAttribute("aria-disabled")) return;
      button.setAttribute("aria-disabled", "true");
      try { await post("act", { hat, action, target, ...more() }); } catch (error) { toast(error.message); }
      button.removeAttribute("aria-disabled");
    },
  }, words);
}

function or_refused(part, what, build) {
  if (!part) return h("p", { class: "refused" }, `${what}: not asked for.`);
  if (part.denied) return h("p", { class: "refused" }, `${what}: this role may not see it. `, h("small", {}, part.denied));
  if (part.error) return h("p", { class: "refused" }, `${what}: ${part.error}`);
  return build(part.value);
}

export function keys(body, parts) {
  const wanted = Object.fromEntries(["projects", "workspaces", "key_configurations", "keks", "deks", "endpoints", "shreds"].map((name) => [name, parts[name]]));
  draw(body, { hat, wanted }, () => {
    if (hat === "customer") return h("p", { class: "refused" }, "The customer sees its own cloud. What Keylake holds is for Keylake's roles.");
    if (hat === "operator") return h("p", { class: "refused" }, "Who runs the machines has no role here: no keys, and no data.");
    return or_refused(wanted.projects, "Projects", (projects) => {
      if (!projects.length) return start();
      return (wanted.workspaces?.value ?? []).map((workspace) => tree(workspace, projects, wanted));
    });
  });
}

function start() {
  return [h("p", {}, "There is no project yet. As customer, account admin and workspace admin, one after the other, make a key, what uses it, and a database under it:"),
    h("button", {
      type: "button", class: "primary", "data-key": "setup", id: "setup",
      onclick: async (event) => {
        event.target.disabled = true;
        event.target.textContent = "making a key, a workspace, a project …";
        try { await post("setup"); } catch (error) { toast(error.message); event.target.disabled = false; }
      },
    }, "Make a project called demo")];
}

function tree(workspace, projects, wanted) {
  const configurations = wanted.key_configurations;
  const name = (id) => configurations?.value?.find((each) => each.key_configuration_id === id);
  const key = name(workspace.key_configuration_id);
  return h("div", {},
    h("h3", {}, `Workspace ${workspace.name}`),
    configurations?.denied ? h("p", { class: "refused" }, "CMK: this role may not see it.")
      : key ? h("p", {}, "CMK ", h("code", {}, key.key.key_arn ?? key.key.key_id ?? key.name), " ", state(key.state), h("small", {}, ` last probe: ${key.last_verdict}`)) : null,
    h("ul", { class: "tree" }, projects.filter((each) => each.workspace_id === workspace.workspace_id).map((project) => branch(project, wanted))));
}

function branch(project, wanted) {
  const keks = wanted.keks?.value?.[project.project_id];
  const endpoints = (wanted.endpoints?.value ?? []).filter((each) => each.project_id === project.project_id);
  const gone = ["SHREDDED", "ERASED"].includes(project.state);
  const buttons = security() && !gone
    ? [act("project.rotate-kek", project.project_id, "Rotate KEK"), act("project.revalidate", project.project_id, "Ask the KMS now"),
      act("project.revoke", project.project_id, "Revoke", "danger"), act("project.restore", project.project_id, "Restore")] : [];
  return h("li", {},
    h("strong", {}, `Project ${project.name} `), state(project.state),
    project.state === "ACTIVE" ? null : h("small", {}, ` ${project.state_reason}`),
    h("ul", { class: "tree" },
      wanted.keks?.denied ? h("li", { class: "refused" }, "KEKs: this role may not see them.")
        : (keks?.keks ?? []).map((kek) => h("li", {}, `KEK version ${kek.kek_version}`, h("small", {}, kek.destroyed ? " destroyed" : ` ${under(wanted.deks?.value?.[project.project_id], kek)}wrapped by CMK version ${kek.cmk_key_version.slice(0, 12)}…`))),
      wanted.endpoints?.denied ? h("li", { class: "refused" }, "Endpoints: this role may not see them.") : endpoints.map(endpoint)),
    buttons.length ? h("div", { class: "row" }, buttons) : null,
    security() && !gone ? shredding(project, wanted.shreds?.value?.[project.project_id]) : null);
}

// Of each object one DEK. Nodes that do not answer, as those without keys, may have more.
function under(counted, kek) {
  const [deks, bytes] = counted?.keks[kek.kek_version] ?? [];
  return deks === undefined ? "" : `${counted.complete ? "" : "at least "}${deks} DEKs in use, for ${(bytes / 1048576).toFixed(1)} MiB; `;
}

// One asks, another approves, both by typing the name. The services refuse the same person twice.
function shredding(project, shred) {
  const typed = h("input", { "data-key": `typed:${project.project_id}`, placeholder: "type the project's name", "aria-label": `Name of ${project.name}, typed`, autocomplete: "off" });
  const word = () => ({ typed: typed.value });
  if (shred?.state !== "asked") return h("div", { class: "row" }, typed, act("project.ask-shred", project.project_id, "Ask to shred", "danger", word));
  return h("div", {},
    h("p", {}, `To be shredded: asked by ${shred.asked_by}; another person approves until ${shred.expires_at.slice(0, 16).replace("T", " ")} UTC.`),
    h("div", { class: "row" }, typed,
      act("project.approve-shred", project.project_id, "Approve: destroy its keys for good", "danger", () => ({ ...word(), shred_id: shred.shred_id })),
      act("project.cancel-shred", project.project_id, "Take it back")));
}

function endpoint(each) {
  const buttons = hat === "workspace-admin"
    ? [act("endpoint.start", each.endpoint_id, "Start"), act("endpoint.stop", each.endpoint_id, "Stop"), act("endpoint.kill", each.endpoint_id, "Kill −9", "danger"), act("endpoint.delete", each.endpoint_id, "Delete", "danger")] : [];
  const seconds = each.stages.filter(({ stage }) => stage !== "first_query").reduce((sum, stage) => sum + stage.seconds, 0);
  return h("li", {}, `Endpoint ${each.name} `, state(each.state),
    h("small", {}, ` ${each.reason}${each.state === "RUNNING" ? `, term ${each.term}, started in ${seconds.toFixed(1)} s, ${each.volume}` : ""}`),
    each.boot_key_made_at ? h("small", {}, "; boot key, in memory only: ", h("span", { "data-since": each.boot_key_made_at })) : null,
    buttons.length ? h("div", { class: "row" }, buttons) : null);
}

const OUTAGES = { refuse: "it answers every request of Keylake's with an error", hang: "nothing that it says reaches Keylake" };

export function customer(section, parts) {
  section.hidden = hat !== "customer";
  if (section.hidden) return;
  const { keys: found, faults } = parts.cloud?.value ?? {};
  draw(section.querySelector(".body"), { found, faults, failed: parts.cloud?.error }, () => or_refused(parts.cloud, "The cloud", () => [
    h("p", {}, "These buttons act in the customer's AWS account, with the customer's credentials. Keylake is not asked, and only notices."),
    found.length ? table(["key", "state", "Keylake's role", "", ], found.map((key) => [
      [h("strong", {}, key.description || "–"), h("br"), h("code", {}, key.arn.split("/").at(-1))].reduce((a, b) => { a.append(b); return a; }, h("span")),
      state(key.state), key.keylake,
      h("div", { class: "row" },
        key.state === "Enabled" ? act("key.disable", key.arn, "Disable", "danger") : key.state === "Disabled" ? act("key.enable", key.arn, "Enable", "primary") : null,
        key.state === "PendingDeletion" ? act("key.cancel-deletion", key.arn, "Cancel deletion") : act("key.schedule-deletion", key.arn, "Schedule deletion", "danger"),
        key.keylake === "denied" ? act("key.allow", key.arn, "Allow Keylake again") : act("key.deny", key.arn, "Deny Keylake", "danger"),
        act("key.rotate", key.arn, "Rotate")),
    ]), "Keys") : h("p", {}, "No keys yet."),
    h("div", { class: "row" }, "The KMS as a whole: ",
      ...(faults.outage ? [act("cloud.recover", "", "Let it answer again", "primary")]
        : [act("cloud.outage", "", "Stop the KMS", "danger"), act("cloud.cut", "", "Cut the network", "danger")]),
      faults.outage ? h("strong", {}, OUTAGES[faults.outage]) : "it works"),
  ]));
}

export function network(section, links) {
  section.hidden = hat !== "operator";
  if (section.hidden) return;
  draw(section.querySelector(".body"), links, () => or_refused(links, "Cuts", (found) => [
    h("p", {}, "These buttons pull cables between services. Both ends stay up, nobody is told, and what is sent meanwhile arrives when it is healed. Leases of whoever does not reach the keymanager run out."),
    h("div", { class: "scroll short", tabindex: 0, role: "region", "aria-label": "Links" },
      table(["between", "and", ""], found.map(({ between: [one, other], cut }) => [one, other,
        cut ? h("strong", {}, `cut (${cut})`) : act("link.cut", `${one}/${other}`, "Cut", "danger")]), "Links")),
    h("div", { class: "row" }, found.some(({ cut }) => cut) ? act("link.heal", "", "Heal all", "primary") : "nothing is cut"),
  ]));
}

export function revocations(body, parts) {
  const wanted = { revocations: parts.revocations, shreds: parts.shreds?.value, projects: parts.projects?.value };
  draw(body, { hat, wanted }, () => {
    if (hat === "customer" || hat === "operator") return h("p", { class: "refused" }, "For Keylake's roles. A receipt, which an auditor or security admin hands over, is for everybody.");
    return or_refused(parts.revocations, "Revocations", (all) => {
      const found = Object.entries(all).flatMap(([project, list]) => list.map((each) => ({ project, ...each })))
        .sort((a, b) => b.detected_at.localeCompare(a.detected_at));
      const shreds = Object.values(wanted.shreds ?? {}).filter((each) => ["deleting", "done"].includes(each?.state)).map(shred);
      if (!found.length && !shreds.length) return h("p", {}, "None yet. Be the customer and disable the key.");
      return shreds.concat(found.slice(0, 5).map((each) => one(each, wanted.projects?.find((project) => project.project_id === each.project))));
    });
  });
}

function one(revocation, project) {
  const end = revocation.sealed_after_s;
  const steps = [["keys dropped by the keymanager", revocation.keks_dropped_after_s],
    ...revocation.instances.map((each) => [`${each.role} ${each.node_id}: ${each.outcome}`, each.after_s])];
  const longest = Math.max(0.001, ...steps.map(([, seconds]) => seconds ?? 0));
  return h("article", {},
    h("h3", {}, state(revocation.state), ` ${project?.name ?? revocation.project}, ${revocation.detected_at.slice(11, 19)} `),
    h("p", {}, revocation.reason, " · ", h("strong", {}, end === null ? "not everybody has answered yet" : `sealed everywhere after ${end.toFixed(2)} s`)),
    h("div", { class: "bars" }, steps.flatMap(([what, seconds]) => [
      h("span", {}, what),
      s("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" }, s("rect", { width: 100 * (seconds ?? 0) / longest, height: 10 })),
      h("span", {}, seconds === null || seconds === undefined ? "waiting" : `${seconds.toFixed(3)} s`)])),
    end === null ? null : h("div", { class: "row" },
      receipt("Signed receipt", revocation.revocation_id, { project_id: revocation.project, revocation_id: revocation.revocation_id }),
      h("small", {}, "check it below, or anywhere: keylake receipt verify FILE")));
}

function receipt(words, name, wanted) {
  return h("button", {
    type: "button", "data-key": `receipt:${name}`,
    onclick: () => download("receipt", { hat, ...wanted }, `${name}.json`).catch((error) => toast(error.message)),
  }, words);
}

function shred(each) {
  return h("article", {},
    h("h3", {}, state("SHREDDED"), ` ${each.project_name}, ${each.decided_at.slice(11, 19)} `),
    h("p", {}, `Asked by ${each.asked_by}, approved by ${each.decided_by}: ${each.keks_destroyed} KEKs destroyed. `,
      h("strong", {}, each.left.length ? `Left: ${each.left.join("; ")}` : "Every node has deleted what it stored.")),
    each.state === "done" ? h("div", { class: "row" }, receipt("Receipt of the shred", each.shred_id, { project_id: each.project_id, kind: "shred" })) : null);
}

// What grows older each second is written over, and nothing is drawn anew for it.
export function ages(at) {
  for (const element of document.querySelectorAll("[data-since]")) element.textContent = `${age(element.dataset.since, at)} old`;
}

export function ours(box, part) {
  draw(box, part, () => or_refused(part, "Our chain", (records) => table(["#", "time", "who", "what", "outcome", "hash"],
    [...records].reverse().map((each) => [String(each.sequence), each.at.slice(11, 19), each.actor, each.action, each.outcome, h("code", {}, each.record_hash.slice(0, 10))]), "Our audit chain")));
}

export function theirs(box, part) {
  draw(box, part?.value?.log ?? part, () => or_refused(part, "The customer's log", ({ log }) => table(["time", "who", "what", "outcome"],
    [...log].reverse().map((each) => [each.at.slice(11, 19), each.who, each.times > 1 ? `${each.what} × ${each.times}` : each.what, each.outcome]), "The customer's log")));
}
