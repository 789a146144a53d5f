/** What a token's probability was: shown beside the token that the pointer or the focus is on. */
import { byId, element } from "./elements.js";

const tip = () => byId("tip");
const percent = (logprob) => `${(Math.exp(logprob) * 100).toPrecision(3)}%`;
const signed = (logprob) => (Object.is(logprob, 0) ? "0" : logprob.toFixed(3).replace("-", "\u2212"));

/** A token as it can be read: white space is made visible. */
export function readable(text) {
  return text === "" ? "(no text)" : text.replaceAll(" ", "\u2423").replaceAll("\n", "\u21b5").replaceAll("\t", "\u21e5");
}

/**
 * Show it.
 * @param {Element} beside the piece of text
 * @param {{text: string, logprob: number | null, top: {text: string, logprob: number}[]}[]} tokens of it
 */
export function show(beside, tokens) {
  tip().replaceChildren(...tokens.map(about));
  tip().hidden = false;
  place(beside.getClientRects()[0] ?? beside.getBoundingClientRect());
}

/** Take it away. */
export function hide() {
  tip().hidden = true;
}

function about({ text, logprob, top }) {
  const known = Number.isFinite(logprob);
  const head = element(
    "p", { class: "tip-head" },
    element("b", { class: "mono" }, readable(text)),
    known ? element("span", {}, `${percent(logprob)} · log-probability ${signed(logprob)}`) : element("span", {}, "no probability told"),
  );
  const others = top.filter((other) => Number.isFinite(other.logprob)).slice(0, 5);
  return element("div", {}, head, others.length ? element("ul", {}, ...others.map((other) => line(other, other.text === text))) : null);
}

function line({ text, logprob }, drawn) {
  const bar = element("span", { class: "bar", "aria-hidden": "true" });
  bar.style.width = `${Math.max(1, Math.exp(logprob) * 100)}%`;
  return element(
    "li", { class: drawn ? "drawn" : null },
    element("span", { class: "mono" }, readable(text), drawn ? element("span", { class: "hidden" }, " (this one)") : null),
    element("span", { class: "track" }, bar),
    element("span", { class: "number" }, percent(logprob)),
  );
}

/** Below a box where there is room, else above it; never outside of the window. */
function place(box) {
  const { offsetWidth: wide, offsetHeight: high } = tip();
  const room = document.documentElement.clientWidth - wide - 8;
  const below = box.bottom + high + 12 < innerHeight || box.top < high + 12;
  tip().style.left = `${Math.max(8, Math.min(box.left, room))}px`;
  tip().style.top = `${below ? box.bottom + 6 : box.top - high - 6}px`;
}
