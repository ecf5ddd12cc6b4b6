// Building the page from data. Text only ever becomes text: names and rows are other people's.

export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  assign(element, attributes);
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

export function s(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  assign(element, attributes);
  element.append(...children.flat());
  return element;
}

function assign(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
}

const drawn = new WeakMap();

// Draw anew only when the data differs, and leave the focus and what was typed where they were: a keyboard must survive
// a picture that lives.
export function draw(parent, data, build) {
  const now = JSON.stringify(data);
  if (drawn.get(parent) === now) return;
  drawn.set(parent, now);
  const focused = document.activeElement?.dataset?.key;
  const typed = [...parent.querySelectorAll("input[data-key]")].map((input) => [input.dataset.key, input.value]);
  parent.replaceChildren(...[build(data)].flat().filter(Boolean));
  for (const [key, value] of typed) {
    const input = parent.querySelector(`input[data-key="${CSS.escape(key)}"]`);
    if (input) input.value = value;
  }
  if (focused) parent.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus();
}

export function table(titles, rows, caption) {
  return h("table", { "aria-label": caption },
    h("thead", {}, h("tr", {}, titles.map((title) => h("th", { scope: "col" }, title)))),
    h("tbody", {}, rows.map((row) => h("tr", {}, row.map((cell) => h("td", {}, cell ?? ""))))));
}

export function state(word) {
  return h("span", { class: `state ${word}` }, word);
}

export function age(since, at) {
  const seconds = Math.max(0, Math.round((Date.parse(at) - Date.parse(since)) / 1000));
  return seconds < 120 ? `${seconds} s` : seconds < 7200 ? `${Math.floor(seconds / 60)} min` : `${Math.floor(seconds / 3600)} h`;
}

export function toast(text) {
  const box = document.getElementById("toast");
  box.textContent = text;
  box.hidden = false;
  clearTimeout(toast.timer);
  toast.timer = setTimeout(() => { box.hidden = true; }, 8000);
}
