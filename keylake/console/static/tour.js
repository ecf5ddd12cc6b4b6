// The story in steps. A step lights a part of the page, may offer to do the deed, and knows when it has happened.

import { post } from "./api.js";
import { toast } from "./dom.js";

const at = (id) => document.getElementById(id);
const project = (snapshot) => snapshot.parts.projects?.value?.find((each) => each.name === "demo") ?? snapshot.parts.projects?.value?.[0];
const sql = (text) => () => { at("sql-text").value = text; at("sql-form").requestSubmit(); };
const key = (snapshot, action) => document.querySelector(`#customer [data-action="${action}"]`);

const STEPS = [
  { title: "The parts", hat: "auditor", light: "picture",
    text: "A Postgres whose compute and storage are separate services. Left of the dotted line is the customer's cloud: the CMK never leaves it. Whoever holds keys in the clear has a thick border, and a ring that shows what is left of its lease: five seconds, then it must forget them unless the keymanager has renewed." },
  { title: "A database", hat: "workspace-admin", light: "keys",
    text: "A workspace has one CMK; every project has KEKs under it, and every WAL piece and layer file a DEK under those. If there is no project yet, make one.",
    until: (snapshot) => Boolean(project(snapshot)), waiting: "waiting for a project" },
  { title: "Some data", hat: "data-user", light: "sql", act: ["Write a secret", sql("create table if not exists notes as select 'the treasure lies under the oak' as note")],
    text: "A data user has a connection string and no way to keys: look at what the page refuses now. The first statement wakes a compute; nothing of it is ever on a disk in the clear.",
    until: (_, ran) => /SELECT 1|already exists|CREATE/.test(ran), waiting: "waiting for the statement" },
  { title: "What a thief gets", hat: "auditor", light: "stored", act: ["Look at the disks", () => tools.list()],
    text: "These are the real files of the object store and of the safekeepers. Search them for 'treasure'." },
  { title: "The customer takes the key away", hat: "customer", light: "customer", act: ["Disable the key", () => key(null, "key.disable")?.click()],
    text: "In its own cloud, with its own credentials, asking nobody at Keylake.",
    until: (snapshot) => (snapshot.parts.cloud?.value?.keys ?? []).some((each) => each.state !== "Enabled"), waiting: "waiting for a key to be disabled" },
  { title: "Sealed", hat: "auditor", light: "revocations",
    text: "The keymanager's next probes were refused; it dropped the KEKs and told every instance. See how long each took to say that keys and plaintext are gone. The receipt is signed, and checked without any service of ours.",
    until: (snapshot) => project(snapshot)?.state === "REVOKED", waiting: "waiting for the revocation" },
  { title: "Nobody gets in", hat: "data-user", light: "sql", act: ["Try to read it", sql("select * from notes")],
    text: "The data user's password is still right. There is nothing to read it with.",
    until: (_, ran) => /KL003/.test(ran), waiting: "waiting for the attempt" },
  { title: "And gives it back", hat: "customer", light: "customer", act: ["Enable the key", () => key(null, "key.enable")?.click()],
    text: "The same key, so everything under it can be opened again.",
    until: (snapshot) => (snapshot.parts.cloud?.value?.keys ?? []).every((each) => each.state === "Enabled"), waiting: "waiting for the key" },
  { title: "Nothing is lost", hat: "data-user", light: "sql", act: ["Read it", sql("select * from notes")],
    text: "The next connection starts a new compute from storage.", until: (_, ran) => /oak/.test(ran), waiting: "waiting for the answer" },
  { title: "Two records of it", hat: "auditor", light: "logs", act: ["Show both logs", () => at("logs-open").getAttribute("aria-expanded") === "false" && at("logs-open").click()],
    text: "Ours is a hash chain, anchored in object storage. The customer's own cloud has recorded the same calls; `keylake audit reconcile` joins them and names what stands on one side only." },
];

let tools = {};
let step = -1;
let done = false;
let ranText = "";

export function prepare(given) {
  tools = given;
  at("tour-start").addEventListener("click", () => go(0));
  at("tour-next").addEventListener("click", () => go(step + 1));
  at("tour-back").addEventListener("click", () => go(Math.max(0, step - 1)));
  at("tour-end").addEventListener("click", () => go(STEPS.length));
  at("tour").addEventListener("keydown", (event) => { if (event.key === "Escape") go(STEPS.length); });
  at("tour-do").addEventListener("click", async () => {
    try { await STEPS[step].act[1](); } catch (error) { toast(error.message); }
  });
}

function go(number) {
  document.querySelectorAll("section.lit").forEach((each) => each.classList.remove("lit"));
  step = number;
  const now = STEPS[step];
  if (!now) { at("tour").close(); step = -1; at("tour-start").focus(); return; }
  done = !now.until;
  ranText = "";
  tools.wear(now.hat);
  at(now.light).hidden = false;
  at(now.light).classList.add("lit");
  at(now.light).scrollIntoView({ block: "start", behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
  at("tour-title").textContent = `${step + 1} of ${STEPS.length}: ${now.title}`;
  at("tour-text").textContent = now.text;
  at("tour-do").hidden = !now.act;
  at("tour-do").textContent = now.act?.[0] ?? "";
  at("tour-back").disabled = step === 0;
  at("tour-next").textContent = step === STEPS.length - 1 ? "Done" : "Next";
  if (!at("tour").open) at("tour").show();
  (now.act ? at("tour-do") : at("tour-next")).focus();
  say();
}

function say() {
  const now = STEPS[step];
  at("tour-wait").textContent = !now?.until ? "" : done ? "✓ done" : `… ${now.waiting}`;
}

export function seen(snapshot) {
  const now = STEPS[step];
  if (!now?.until || done || snapshot.hat !== now.hat) return;
  done = Boolean(now.until(snapshot, ranText));
  say();
}

export function ran(text) {
  ranText = text;
  const now = STEPS[step];
  if (now?.until && !done && now.light === "sql") { done = Boolean(now.until({ parts: {} }, text)); say(); }
}
