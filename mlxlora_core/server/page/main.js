/** The page: its controls, its settings, and what happens when. */
import { Conversation } from "./conversation.js";
import { byId, element, oneLine } from "./elements.js";
import { get } from "./protocol.js";
import * as settings from "./settings.js";
import * as tip from "./tip.js";

const KEY = "mlxlora-key"; // the page of a run has it too
const wide = matchMedia("(min-width: 62rem)");
const prompt = byId("prompt");

/** What is known of the server: from /api/page and /v1/models. */
const server = { title: "mlxlora", models: [], template: true, questions: [], token: false, run: false };
let kinds = new Map(); // model -> {kind, template}
let defaults = {};
let values = {};
let asked = []; // prompts, from the oldest on

const conversation = new Conversation(byId("turns"), {
  values: () => values,
  key,
  template: hasTemplate,
  changed: showState,
  say: (text) => (byId("status").textContent = text),
  refused: () => wantKey("The server refused the API key."),
});

function key() {
  return sessionStorage.getItem(KEY) ?? "";
}

function hasTemplate(model) {
  return kinds.get(model)?.template ?? server.template;
}

/** The models that are asked now. */
const used = () => (values.mode === "compare" ? [values.model, values.with] : [values.model]);
/** Whether a model is asked in its chat template. */
const chats = (model) => values.form === "chat" && hasTemplate(model);

// --- the server ---------------------------------------------------------------

/** Ask the server what there is, and show it. */
async function load() {
  try {
    Object.assign(server, await get("/api/page", key()));
    if (server.token && !key()) return wantKey("");
    const { data } = await get("/v1/models", key());
    kinds = new Map(data.map((model) => [model.id, model.mlxlora ?? {}]));
    if (!server.models.length) server.models = [...kinds.keys()];
    byId("key-form").hidden = true;
    byId("forget").hidden = !key();
    begin();
  } catch (fault) {
    if (fault.status === 401) return wantKey(key() ? "The server refused the API key." : "");
    byId("welcome").replaceChildren(element("p", { class: "fault", role: "alert" }, oneLine(fault.message)));
  }
}

function wantKey(message) {
  byId("key-form").hidden = false;
  byId("key-fault").textContent = message;
  byId("welcome").hidden = true;
  byId("key").focus();
}

/** Fill the page with what the server has. */
function begin() {
  const { models, questions, title, run } = server;
  const plain = questions.length > 0 && questions.every((one) => one.chat === false);
  defaults = {
    mode: models.length > 1 ? "compare" : "chat", model: models[0] ?? "", with: models[1] ?? "",
    form: plain ? "plain" : "chat", system: "", frame: commonFrame(questions),
    temperature: 0, top_p: 1, max_tokens: 256, seed: 0, marks: "other", view: "markdown", unsure: "hidden",
  };
  document.title = title === "mlxlora" ? title : `${title} · mlxlora`;
  byId("title").textContent = title;
  byId("run-link").hidden = !run;
  for (const name of ["model", "with"]) byId(name).replaceChildren(...models.map((id) => element("option", { value: id }, id)));
  byId("mode-compare").disabled = models.length < 2;
  byId("send").disabled = models.length === 0;
  showQuestions(questions);
  takeAddress();
  byId("welcome").hidden = conversation.turns.length > 0;
  if (wide.matches) prompt.focus();
}

/** "Q: {}\nA:" where every question is of that form; "{}" where there is no such form. */
function commonFrame(questions) {
  const frames = questions.map((one) => /^([\p{L} ]{1,20}: ?)[^]*(\n[\p{L} ]{1,20}:)$/u.exec(one.prompt));
  const [first] = frames;
  const same = first && frames.every((found) => found && found[1] === first[1] && found[2] === first[2]);
  return same ? `${first[1]}{}${first[2]}` : "{}";
}

function showQuestions(questions) {
  byId("questions").hidden = byId("open-questions").hidden = questions.length === 0;
  byId("count").textContent = String(questions.length);
  byId("question-list").replaceChildren(...questions.map((one) => element("li", {}, questionButton(one))));
  byId("suggestions").replaceChildren(...questions.slice(0, 6).map((one) => element("li", {}, questionButton(one))));
}

function questionButton(one) {
  const made = element("button", { type: "button", class: "question", dir: "auto" }, oneLine(bare(one.prompt), 160));
  made.addEventListener("click", () => {
    closePanel()?.focus();
    ask(one.prompt, { ...one, alone: true });
  });
  return made;
}

/** A question without its frame. */
function bare(text) {
  const [before, after] = (values.frame ?? defaults.frame).split("{}");
  return text.startsWith(before) && text.endsWith(after) ? text.slice(before.length, text.length - after.length) : text;
}

// --- settings -----------------------------------------------------------------

function takeAddress() {
  values = settings.fromAddress(location.hash.slice(1), defaults);
  for (const name of ["model", "with"]) if (!server.models.includes(values[name])) values[name] = defaults[name];
  if (server.models.length < 2) values.mode = "chat";
  for (const name of settings.NAMES) {
    for (const control of document.getElementsByName(name)) {
      if (control.type === "radio") control.checked = control.value === values[name];
      else if (control.type === "checkbox") control.checked = control.value === values[name];
      else control.value = values[name] ?? "";
      control.removeAttribute("aria-invalid");
    }
  }
  showValues();
}

function takeControl(control) {
  const off = control.type === "checkbox" && !control.checked;
  const value = settings.read(control.name, off ? control.dataset.off : control.value);
  control.toggleAttribute("aria-invalid", false);
  if (value === undefined) return control.setAttribute("aria-invalid", "true");
  values = { ...values, [control.name]: value };
  for (const twin of document.getElementsByName(control.name)) if (twin !== control && twin.type !== "radio") twin.value = control.value;
  const fragment = settings.toAddress(values, defaults);
  history.replaceState(null, "", fragment ? `#${fragment}` : location.pathname + location.search);
  showValues();
  if (["view", "marks"].includes(control.name)) conversation.redraw();
}

/** What follows from the settings. */
function showValues() {
  const both = values.mode === "compare";
  document.body.dataset.mode = values.mode;
  document.body.dataset.unsure = values.unsure;
  byId("with-field").hidden = !both;
  byId("form-field").hidden = !used().some(hasTemplate);
  byId("system-field").hidden = !used().some(chats);
  byId("frame-field").hidden = byId("no-template").hidden = used().every(chats);
  byId("summary").textContent = [
    used().join(" beside "), `temperature ${values.temperature}`, `top-p ${values.top_p}`, `at most ${values.max_tokens} tokens`,
    values.seed === null ? "no seed" : `seed ${values.seed}`,
  ].join(" · ");
  prompt.placeholder = both ? "Ask both models" : "Ask the model";
}

// --- asking -------------------------------------------------------------------

async function ask(text, question = {}) {
  if (conversation.busy) {
    conversation.stop();
    while (conversation.busy) await new Promise((done) => setTimeout(done, 10));
  }
  byId("welcome").hidden = true;
  asked.push(bare(text));
  await conversation.ask(text, question);
}

function send() {
  const text = prompt.value;
  if (!text.trim() || conversation.busy || !server.models.length) return;
  prompt.value = "";
  fit();
  const framed = bare(text) !== text || values.frame === "{}";
  ask(used().some(chats) || framed ? text : values.frame.replace("{}", () => text.trim()));
}

function showState() {
  const { busy } = conversation;
  document.body.classList.toggle("busy", busy);
  byId("send").textContent = busy ? "Stop" : "Send";
  byId("send").classList.toggle("stop", busy);
  byId("fresh").disabled = !busy && conversation.turns.length === 0;
}

/** As high as its text, within limits that the style sheet has. */
function fit() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight + 2}px`;
}

function startAnew() {
  conversation.clear();
  byId("welcome").hidden = false;
  byId("status").textContent = "New conversation";
  showState();
  prompt.focus();
}

// --- the panel on a small screen ----------------------------------------------

function openPanel(button, section) {
  const open = button.getAttribute("aria-expanded") !== "true";
  closePanel();
  if (!open) return;
  button.setAttribute("aria-expanded", "true");
  document.body.classList.add("panel");
  byId("main").inert = true;
  section.open = true;
  for (const other of document.querySelectorAll("#side > details")) if (other !== section) other.open = false;
  section.querySelector("summary").focus();
}

function closePanel() {
  const opener = document.querySelector("header [aria-expanded=true]");
  opener?.setAttribute("aria-expanded", "false");
  document.body.classList.remove("panel");
  byId("main").inert = false;
  return opener;
}

// --- what happens when --------------------------------------------------------

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (conversation.busy) conversation.stop();
  else send();
});
prompt.addEventListener("input", fit);
prompt.addEventListener("keydown", (event) => {
  if (event.isComposing) return;
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    send();
  } else if (event.key === "ArrowUp" && prompt.value === "" && asked.length) {
    event.preventDefault();
    prompt.value = asked.at(-1);
    fit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (!byId("tip").hidden) tip.hide();
  else if (document.body.classList.contains("panel")) closePanel()?.focus();
  else conversation.stop();
});
document.addEventListener("scroll", tip.hide, { passive: true, capture: true });
byId("side").addEventListener("input", ({ target }) => target.name && takeControl(target));
byId("fresh").addEventListener("click", startAnew);
byId("open-settings").addEventListener("click", ({ currentTarget }) => openPanel(currentTarget, byId("settings")));
byId("open-questions").addEventListener("click", ({ currentTarget }) => openPanel(currentTarget, byId("questions")));
byId("close-panel").addEventListener("click", () => closePanel()?.focus());
wide.addEventListener("change", () => {
  closePanel();
  for (const section of document.querySelectorAll("#side > details")) section.open = wide.matches;
});
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, byId("key").value.trim());
  byId("key").value = "";
  byId("welcome").hidden = conversation.turns.length > 0;
  load();
});
byId("forget").addEventListener("click", () => {
  sessionStorage.removeItem(KEY);
  byId("forget").hidden = true;
  wantKey("The key is forgotten.");
});
window.addEventListener("hashchange", takeAddress);

showState();
load();
