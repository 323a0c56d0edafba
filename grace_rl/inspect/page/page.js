// The page works without this script, but for models; with it lists follow their fields and runs
// that train, and answers come in parts.
"use strict";

const root = document.documentElement;
const kept = localStorage.getItem("grace-rl-theme");
if (kept) root.dataset.theme = kept;

function switchTheme() {
  const dark = getComputedStyle(root).colorScheme === "dark" ||
    (!root.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
  root.dataset.theme = dark ? "light" : "dark";
  localStorage.setItem("grace-rl-theme", root.dataset.theme);
}

// -- following ---------------------------------

const LOOK_AGAIN = 2000;
let asked = 0;

// Put a page's live parts in the place of ours: the place on the screen, the focus and what was
// folded open stay, and fields are no live parts.
async function follow(address) {
  const mine = ++asked;
  const answer = await fetch(address);
  const text = await answer.text();
  if (mine !== asked) return;  // something newer was asked meanwhile
  const fresh = new DOMParser().parseFromString(text, "text/html");
  const focus = document.activeElement?.getAttribute("href");
  const place = scrollY;
  const open = [...document.querySelectorAll("details[id][open]")].map(part => part.id);
  const shut = [...document.querySelectorAll("details[id]:not([open])")].map(part => part.id);
  for (const part of document.querySelectorAll("[data-live]")) {
    const other = fresh.getElementById(part.id);
    if (other && other.innerHTML !== part.innerHTML) part.replaceChildren(...other.childNodes);
    const mistake = fresh.querySelector("#main [role=alert]");
    if (!other && mistake) part.replaceChildren(mistake);
  }
  for (const id of open) document.getElementById(id)?.setAttribute("open", "");
  for (const id of shut) document.getElementById(id)?.removeAttribute("open");
  if (focus && document.activeElement === document.body)
    document.querySelector(`a[href="${CSS.escape(focus)}"]`)?.focus({preventScroll: true});
  scrollTo({top: place, behavior: "instant"});
  document.body.dataset.stamp = fresh.body.dataset.stamp;
}

async function look() {
  if (!document.hidden) {
    try {
      const stamp = await (await fetch("/stamp")).text();
      if (stamp !== document.body.dataset.stamp) await follow(location.href);
      const clock = document.querySelector("#as-of time");
      clock.textContent = new Date().toTimeString().slice(0, 8);
    } catch {
      document.querySelector("#as-of").classList.add("lost");
      document.querySelector("#as-of span").textContent = "the server is gone";
    }
  }
  setTimeout(look, LOOK_AGAIN);
}

// -- fields ---------------------------------

function addressOf(form) {
  const pairs = [...new FormData(form)].filter(([, value]) => value !== "");
  return `${form.getAttribute("action")}?${new URLSearchParams(pairs)}`;
}

let waiting = 0;
function fieldChanged(event) {
  const form = event.target.closest("form[data-fields]");
  if (!form) return;
  clearTimeout(waiting);
  waiting = setTimeout(async () => {
    const address = addressOf(form);
    if (event.target.hasAttribute("data-anew")) return location.assign(address);
    history.replaceState(null, "", address);
    await follow(address);
  }, event.type === "input" ? 150 : 0);
}

// -- answers in parts ---------------------------------

// A place is busy until its answer is whole, or until it says why there is none.
async function stream(address, target) {
  const mine = target.dataset.asked = String(Math.random());
  const note = document.createElement("div");
  note.setAttribute("role", "status");
  note.className = "waiting";
  target.setAttribute("aria-busy", "true");
  try {
    const answer = await fetch(address);
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const {done, value} = await reader.read();
      if (target.dataset.asked !== mine) reader.cancel();  // something newer was asked meanwhile
      if (done || target.dataset.asked !== mine) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) show(JSON.parse(line), target, note);
    }
    note.remove();
  } catch {
    note.setAttribute("role", "alert");
    note.textContent = "The answer broke off; the terminal of grace-rl inspect may say why.";
    target.append(note);
  }
  if (target.dataset.asked === mine) target.setAttribute("aria-busy", "false");
  else note.remove();
}

function show(event, target, note) {
  if ("html" in event) {
    const part = target.querySelector(`[data-part="${event.into || "answer"}"]`) || target;
    part.innerHTML = event.html;
    note.remove();
    return;
  }
  note.textContent = `${event.label} …`;
  const bar = document.createElement("progress");
  bar.setAttribute("aria-label", event.label);
  if (event.share !== null) bar.value = event.share;
  note.append(bar);
  if (!note.isConnected) target.append(note);
}

function edited(event) {
  const field = event.target.closest("textarea[data-reads]");
  if (!field) return;
  clearTimeout(waiting);
  waiting = setTimeout(() => {
    const rationale = new URLSearchParams({rationale: field.value});
    stream(`${field.dataset.reads}&${rationale}`, field.closest("[data-side]"));
  }, 150);
}

// -- the map ---------------------------------

function frame(event) {
  const slider = event.target.closest("input[data-frames]");
  if (!slider) return;
  const parts = [...document.querySelectorAll(".map .frame")];
  parts.forEach((part, place) => part.classList.toggle("shown", place === Number(slider.value)));
  document.getElementById("frame-step").textContent = parts[slider.value].dataset.step;
}

// -- notes ---------------------------------

async function note(form) {
  const answer = await fetch("/note", {
    method: "POST",
    headers: {"content-type": "application/json"},
    body: JSON.stringify({...form.dataset, ...Object.fromEntries(new FormData(form))}),
  });
  const said = document.getElementById("said"), text = await answer.text();
  if (answer.ok) said.innerHTML = text; else said.textContent = text;
}

// -- keys ---------------------------------

function key(event) {
  const typing = event.target.closest("input, textarea, select");
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  const rel = {j: "next", k: "prev"}[event.key];
  const flag = {g: "good", b: "bad"}[event.key], form = document.querySelector("form[data-note]");
  if (flag && form) {
    form.elements.flag.value = form.elements.flag.value === flag ? "" : flag;
    note(form);
  }
  if (rel) document.querySelector(`a[rel="${rel}"]`)?.click();
}

addEventListener("DOMContentLoaded", () => {
  document.getElementById("theme").addEventListener("click", switchTheme);
  for (const kind of ["input", "change"]) document.addEventListener(kind, fieldChanged);
  document.addEventListener("input", edited);
  document.addEventListener("input", frame);
  document.addEventListener("keydown", key);
  document.addEventListener("submit", event => {
    if (!event.target.hasAttribute("data-note")) return;
    event.preventDefault();
    note(event.target);
  });
  document.addEventListener("click", async event => {
    const button = event.target.closest("button[data-ask]");
    if (!button) return;
    button.disabled = true;
    await stream(button.dataset.ask, document.getElementById(button.dataset.into));
    button.disabled = false;
  });
  for (const place of document.querySelectorAll("[data-stream]")) stream(place.dataset.stream, place);
  setTimeout(look, LOOK_AGAIN);
});
