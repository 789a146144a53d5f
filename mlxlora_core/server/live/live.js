// The page of a run: asks each second what is new, and draws it.

import { chart } from "/run/chart.js";
import { duration, element, visible } from "/run/parts.js";

const WAIT = 1000, SLOW = 5000, BESIDE_EVERY = 15000, KINDS = 6;
const byId = (id) => document.getElementById(id);
const token = document.querySelector("meta[name=mlxlora-run]").content;
const here = { train: [], valid: [] };
const others = new Map(); // name -> its curves
let cursor = "", last = null, seen = "", besideAt = 0, stopping = false;

async function ask(path, options = {}) {
  const key = sessionStorage.getItem("mlxlora-key");
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const answer = await fetch(path, { ...options, headers, cache: "no-store" });
  if (answer.status === 401) byId("key").hidden = false;
  if (!answer.ok) throw new Error((await answer.json().catch(() => null))?.error?.message ?? `status ${answer.status}`);
  return answer.json();
}

byId("key").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("mlxlora-key", byId("key-value").value);
  byId("key").hidden = true;
});

// --- the run ---

async function look() {
  const told = await ask(`/api/run?cursor=${encodeURIComponent(cursor)}`);
  if (told.anew) [here.train, here.valid] = [[], []];
  for (const report of told.reports) add(here[report.kind], report);
  cursor = told.cursor;
  last = told;
  head(told);
  if (told.reports.length || told.anew) draw();
  const valid = here.valid.at(-1)?.step ?? -1;
  const now = `${valid} ${told.stage} ${told.run.state}`;
  if (now !== seen) {
    await Promise.all([samples(), rows()]);
    seen = now;
  }
  if (Date.now() - besideAt > BESIDE_EVERY) {
    besideAt = Date.now();
    await beside();
  }
}

/** Of two reports of one step the later counts; steps that come again take those behind them away. */
function add(reports, report) {
  while (reports.length && reports.at(-1).step >= report.step) reports.pop();
  reports.push(report);
}

function head({ run, stage, stages }) {
  byId("name").textContent = visible(run.name);
  const newest = here.train.at(-1);
  const step = newest?.step ?? run.step;
  document.title = `${Math.floor(100 * step / (run.steps || 1))} % · ${visible(run.name)} · mlxlora run`;
  const state = byId("state");
  if (state.textContent !== run.state) state.textContent = run.state;
  state.className = `tag ${run.state}`;
  const said = [`step ${step.toLocaleString("en")} of ${run.steps.toLocaleString("en")}`];
  if (run.state === "running" && stage) {
    said.unshift(`stage ${stages.indexOf(stage) + 1} of ${stages.length} (${stage})`);
    const left = stage === "train" && newest?.steps_per_second ? (run.steps - step) / newest.steps_per_second : 0;
    if (left > 0) said.push(`about ${duration(left)} left`);
  } else if (run.seconds) said.push(`training took ${duration(run.seconds)}`);
  const speed = newest?.tokens_per_second;
  if (run.state === "running" && speed) said.push(`${Math.round(speed).toLocaleString("en")} tokens/s`);
  byId("where").textContent = visible(said.join(", ") + (run.fault ? `: ${run.fault}` : ""));
  byId("progress").max = run.steps || 1;
  byId("progress").value = step;
  byId("stop").hidden = !token || run.state !== "running";
  if (run.state !== "running" && stopping) say("The run has stopped. The same command goes on with it.");
}

function say(text) {
  byId("told").hidden = !text;
  if (byId("told").textContent !== text) byId("told").textContent = text;
}

// --- the curves ---

function points(reports, figure, scale = 1) {
  return reports.filter((one) => figure in one).map((one) => [one.step, one[figure] * scale]);
}

function draw() {
  const runs = [["", here], ...others].map(([name, found], i) => ({ name, found, kind: `s${2 * i % KINDS}`, other: `s${(2 * i + 1) % KINDS}` }));
  const label = (name, what) => (name ? `${what}, ${visible(name)}` : what);
  chart(byId("loss"), "Loss", runs.flatMap(({ name, found, kind, other }) => [
    { label: label(name, "train"), kind, points: points(found.train, "loss") },
    { label: label(name, "valid"), kind: other, dashed: true, points: points(found.valid, "loss") },
  ]), (v) => v.toFixed(4), 300);
  const small = (id, title, figure, scale, tell) => chart(byId(id), title, runs.map(({ name, found, kind }) => ({
    label: name ? visible(name) : "this run", kind, points: points(found.train, figure, scale),
  })), tell);
  small("rate", "Learning rate", "learning_rate", 1, (v) => v.toExponential(2));
  small("speed", "Speed", "tokens_per_second", 1, (v) => `${Math.round(v)} tokens/s`);
  small("padding", "Padding", "padding", 100, (v) => `${v.toFixed(1)} %`);
  small("memory", "Peak memory", "peak_memory_bytes", 1e-9, (v) => `${v.toFixed(2)} GB`);
}

// --- the runs beside it ---

async function beside() {
  const runs = await ask("/api/run/beside");
  byId("beside-section").hidden = runs.length < 2;
  const differing = Object.keys(runs.find((run) => Object.keys(run.differing).length)?.differing ?? {});
  const loss = (value) => (value === null ? "–" : value.toFixed(4));
  const line = (run, i) => element("tr", {},
    element("th", { scope: "row" }, i === 0 ? `${run.path} (this run)` : tick(run)),
    element("td", {}, element("span", { class: `tag ${run.state}` }, run.state)),
    element("td", { class: "number" }, run.state === "damaged" ? "–" : `${run.step}/${run.steps}`),
    ...["train_loss", "valid_loss", "test_loss"].map((name) => element("td", { class: "number" }, loss(run[name]))),
    ...differing.map((key) => {
      const value = run.differing[key] ?? null, mine = runs[0].differing[key] ?? null;
      return element("td", { class: i && value !== mine ? "differs" : "" }, value === null ? "–" : String(value).slice(0, 80));
    }));
  const focused = document.activeElement?.id;
  byId("beside").replaceChildren(element("table", {},
    element("caption", {}, "Losses in nats a counted token; settings that differ from this run's are tinted"),
    element("thead", {}, element("tr", {}, ...["run", "state", "step", "train", "valid", "test"].map((name, i) =>
      element("th", { scope: "col", class: i > 1 ? "number" : "" }, name)),
    ...differing.map((key) => element("th", { scope: "col" }, key)))),
    element("tbody", {}, ...runs.map(line))));
  if (focused) byId(focused)?.focus();
}

function tick(run) {
  const box = element("input", { type: "checkbox", id: `tick-${run.path}`, checked: others.has(run.path), disabled: run.state === "damaged" });
  box.addEventListener("change", async () => {
    others.delete(run.path);
    try {
      if (box.checked) others.set(run.path, await ask(`/api/run/curves?name=${encodeURIComponent(run.path)}`));
    } catch (fault) {
      say(visible(fault.message));
    }
    draw();
  });
  return element("label", {}, box, run.path);
}

// --- what it says, and what it reads ---

async function samples() {
  const told = await ask("/api/run/samples");
  byId("samples-section").hidden = !told.length;
  const prompts = [...new Set(told.map((one) => one.prompt))];
  byId("samples-note").textContent = "The run's prompts, asked of the base, at validations while there is time to spare, and at the end.";
  const open = new Set([...byId("samples").querySelectorAll("details[open]")].map((one) => one.dataset.prompt));
  const fresh = !byId("samples").children.length;
  byId("samples").replaceChildren(...prompts.map((prompt, i) => {
    const said = told.filter((one) => one.prompt === prompt);
    const order = (one) => (one.step === "before" ? -1 : one.step === "after" ? Infinity : one.step);
    said.sort((a, b) => order(b) - order(a));
    const wanted = said.find((one) => one.expected)?.expected;
    const made = element("details", { open: fresh ? i === 0 : open.has(prompt) },
      element("summary", {}, element("span", { class: "prompt", dir: "auto" }, prompt.trim()),
        element("span", { class: "tag" }, `${said.length} ${said.length === 1 ? "answer" : "answers"}`)),
      element("div", { class: "list" },
        ...said.map((one) => answer(typeof one.step === "number" ? `Step ${one.step}` : one.step === "before" ? "Before" : "After", one.text)),
        wanted ? answer("What the row says", wanted) : null));
    made.dataset.prompt = prompt;
    return made;
  }));
}

function answer(title, text) {
  return element("div", { class: "said" }, element("h3", {}, title), element("pre", { dir: "auto" }, text.trim() || "(nothing)"));
}

async function rows() {
  const told = await ask("/api/run/rows");
  byId("rows-section").hidden = !told.length;
  byId("rows").replaceChildren(...told.map((parts) => element("div", { class: "row" }, ...parts.flatMap((part) => [
    parts.length > 1 ? element("p", { class: "role" }, part.counts ? `${part.role}, counts` : part.role) : null,
    element("pre", { dir: "auto", class: part.counts ? "counting" : "" }, element("span", { class: part.counts ? "counts" : "" }, part.text)),
  ].filter(Boolean)))));
}

// --- the button ---

byId("stop").addEventListener("click", () => byId("sure").showModal());
byId("sure").addEventListener("close", async () => {
  if (byId("sure").returnValue !== "yes") return;
  byId("stop").disabled = true;
  try {
    await ask("/api/run/stop", { method: "POST", headers: { "X-Mlxlora-Run": token } });
    stopping = true;
    say("Stopping: the step under way is finished and saved.");
  } catch (fault) {
    byId("stop").disabled = false;
    say(visible(`It could not be stopped: ${fault.message}`));
  }
});

// --- for ever ---

async function follow() {
  let wait = WAIT;
  try {
    await look();
    if (byId("told").dataset.lost) {
      delete byId("told").dataset.lost;
      say("");
    }
    if (last.run.state !== "running") wait = SLOW;
  } catch (fault) {
    wait = SLOW;
    const gone = fault instanceof TypeError;
    if (!(gone && stopping)) {
      byId("told").dataset.lost = "1";
      say(gone ? "The server has gone; this is what it told last." : visible(fault.message));
    }
    if (gone) byId("stop").hidden = true;
  }
  setTimeout(follow, wait);
}

let resized;
new ResizeObserver(() => {
  clearTimeout(resized);
  resized = setTimeout(() => last && draw(), 100);
}).observe(byId("loss"));
follow();
