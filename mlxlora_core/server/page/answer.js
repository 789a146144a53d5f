/** An answer on the page: its text as it comes, what differs marked, each token with its probability. */
import { element } from "./elements.js";
import { blocks } from "./markdown.js";
import * as tip from "./tip.js";
import { holding, places } from "./tokens.js";

const STEPS = [0.5, 0.2, 0.05]; // probabilities below which a token is underlined once, twice, three times as strongly
const NEAR = 160; // pixels from the end of the page, within which a reader is taken along
const ENDS = {
  stop: "ended by itself", length: "cut at the limit on its tokens", stopped: "stopped by you",
  content_filter: "filtered", timeout: "out of time",
};

/** The text of an answer, or of a reference: what is common to both. */
export class Text {
  constructor(values) {
    this.values = values;
    this.text = "";
    this.tokens = [];
    this.marks = [];
    this.place = element("div", { class: "said", dir: "auto" });
    this.drawn = []; // [key, node] of each block
    this.waiting = false;
    this.place.addEventListener("pointerover", ({ target }) => this.#point(target));
    this.place.addEventListener("pointerout", () => this.#leave());
    this.place.addEventListener("focusin", ({ target }) => this.#point(target));
    this.place.addEventListener("focusout", () => this.#leave());
    this.place.addEventListener("keydown", (event) => this.#walk(event));
  }

  /** Mark some ranges of the text. */
  mark(ranges) {
    this.marks = ranges;
    this.draw();
  }

  /** Draw it soon, however many parts come; it takes a fifth of the time at most. */
  drawSoon() {
    if (this.waiting) return;
    this.waiting = true;
    setTimeout(() => {
      if (!this.waiting) return;
      const begin = performance.now();
      takingAlong(() => this.draw());
      this.took = performance.now() - begin;
    }, Math.min(1000, Math.max(25, 4 * (this.took ?? 0))));
  }

  /** Draw it now; blocks that are as they were stay. */
  draw() {
    this.waiting = false;
    this.places = places(this.text, this.tokens);
    const plain = this.values().view === "plain";
    this.place.classList.toggle("plain", plain);
    const leaf = (text, at) => this.#leaf(text, at);
    const parts = plain ? [{ start: 0, end: this.text.length, build: () => element("p", {}, leaf(this.text, 0)) }] : blocks(this.text, leaf);
    const settled = this.place.getAttribute("aria-busy") !== "true";
    const next = parts.map(({ start, end, build }, i) => {
      const key = JSON.stringify([start, this.text.slice(start, end), this.#firstToken(start), this.#lastToken(end), this.#marksIn(start, end), plain, settled]);
      return this.drawn[i]?.[0] === key ? this.drawn[i] : [key, build()];
    });
    next.forEach(([, node], i) => {
      if (this.drawn[i]?.[1] === node) return;
      if (this.drawn[i]) this.drawn[i][1].replaceWith(node);
      else this.place.append(node);
    });
    for (const [, node] of this.drawn.slice(next.length)) node.remove();
    this.drawn = next;
    if (settled) this.#first()?.setAttribute("tabindex", "0");
  }

  #firstToken = (start) => holding(this.places, start, (one) => one.end);
  #lastToken = (end) => holding(this.places, end - 1, (one) => one.end);
  #marksIn = (start, end) => this.marks.filter(([from, to]) => from < end && to > start);

  /** The nodes of a piece of the text, cut where a token or a mark begins or ends. */
  #leaf(text, at) {
    const made = document.createDocumentFragment();
    const end = at + text.length;
    let place = made;
    let mark = holding(this.marks, at, ([, to]) => to);
    let token = holding(this.places, at, (one) => one.end);
    for (let from = at; from < end; ) {
      const [marked, markEnd] = within(this.marks[mark], from, ([a, b]) => [a, b]);
      const [held, tokenEnd] = within(this.places[token], from, (one) => [one.start, one.end]);
      const to = Math.min(end, markEnd, tokenEnd);
      if (!marked) place = made;
      else if (place === made) made.append((place = element("mark")));
      const piece = text.slice(from - at, to - at);
      if (held) place.append(this.#token(piece, token));
      else place.append(...element("span", {}, piece).childNodes);
      if (this.marks[mark]?.[1] <= to) (mark++, (place = made));
      if (this.places[token]?.end <= to) token++;
      from = to;
    }
    return made;
  }

  #token(piece, index) {
    const { first, last } = this.places[index];
    const least = Math.min(...this.tokens.slice(first, last + 1).map(({ logprob }) => logprob ?? 0));
    const unsure = STEPS.filter((step) => Math.exp(least) < step).length;
    return element("span", { class: `token${unsure ? ` unsure-${unsure}` : ""}`, tabindex: "-1", "data-index": index, "aria-describedby": "tip" }, piece);
  }

  #first() {
    return this.place.querySelector(".token");
  }

  /** Tell of the token that a piece of text belongs to; all of its pieces are lit. */
  #point(target) {
    const { index } = target.dataset ?? {};
    const { first, last } = this.places?.[index] ?? {};
    if (first === undefined) return;
    this.#leave();
    for (const piece of this.place.querySelectorAll(`[data-index="${Number(index)}"]`)) piece.classList.add("lit");
    tip.show(target, this.tokens.slice(first, last + 1).slice(0, 4));
  }

  #leave() {
    for (const piece of this.place.querySelectorAll(".lit")) piece.classList.remove("lit");
    tip.hide();
  }

  /** Arrows lead from token to token. */
  #walk(event) {
    const { target, key, ctrlKey, altKey, metaKey } = event;
    if (!target.classList.contains("token") || ctrlKey || altKey || metaKey) return;
    const all = [...this.place.querySelectorAll(".token")];
    const at = all.indexOf(target);
    const other = (one) => one.dataset.index !== target.dataset.index;
    const next = {
      ArrowRight: () => all.slice(at + 1).find(other),
      ArrowDown: () => all.slice(at + 1).find((one) => one.getBoundingClientRect().top > target.getBoundingClientRect().bottom - 2),
      ArrowLeft: () => all.slice(0, at).findLast(other),
      ArrowUp: () => all.slice(0, at).findLast((one) => one.getBoundingClientRect().bottom < target.getBoundingClientRect().top + 2),
      Home: () => all[0],
      End: () => all.at(-1),
    }[key];
    if (!next) return;
    event.preventDefault();
    const to = next();
    if (!to) return;
    target.setAttribute("tabindex", "-1");
    to.setAttribute("tabindex", "0");
    to.focus();
  }
}

/** Change the page; who has been at its end still is. */
export function takingAlong(change) {
  const page = document.scrollingElement;
  const near = page.scrollHeight - page.clientHeight - page.scrollTop < NEAR;
  change();
  if (near) page.scrollTop = page.scrollHeight;
}

/** [whether an offset is in a range, where that changes next]. */
function within(range, offset, bounds) {
  if (!range) return [false, Infinity];
  const [start, end] = bounds(range);
  return offset < start ? [false, start] : [true, end];
}

/** An answer of a model. */
export class Answer extends Text {
  /**
   * @param {string} model its id
   * @param {number} side 0 or 1
   * @param {() => object} values the settings of now
   */
  constructor(model, side, values) {
    super(values);
    this.model = model;
    this.failed = false;
    this.began = performance.now();
    this.first = null;
    this.place.setAttribute("aria-busy", "true");
    this.meta = element("p", { class: "meta" }, "waiting for the first token …");
    this.exact = element("span", { class: "tag exact", hidden: true }, "exactly the reference");
    this.element = element(
      "section", { class: `answer side-${side}`, "aria-label": `Answer of ${model}` },
      element("h3", {}, element("span", { class: "dot", "aria-hidden": "true" }), element("bdi", {}, model), this.exact),
      this.place,
      this.meta,
    );
  }

  /** Add a part of it. */
  add({ text, tokens, finish, tokensUsed }) {
    if (text || tokens.length) this.first ??= performance.now();
    this.text += text;
    this.tokens.push(...tokens);
    this.finish = finish ?? this.finish;
    this.tokensUsed = tokensUsed ?? this.tokensUsed;
    this.drawSoon();
    if (this.first) this.meta.textContent = "writing …";
  }

  /** It has come to its end, whatever that was. */
  end(why = this.finish) {
    const count = this.tokensUsed ?? this.tokens.length;
    const seconds = (performance.now() - (this.first ?? this.began)) / 1000;
    const speed = count > 1 && seconds > 0.02 ? `${((count - 1) / seconds).toPrecision(3)} tokens/s` : null;
    const told = [count ? `${count} token${count === 1 ? "" : "s"}` : null, speed, ENDS[why] ?? why];
    this.meta.textContent = told.filter(Boolean).join(" · ");
    this.place.setAttribute("aria-busy", "false");
    this.draw();
    if (!this.text && !this.failed) this.place.replaceChildren(element("p", { class: "nothing" }, "(nothing)"));
  }

  /** It went wrong: one line says how. */
  fail(message) {
    this.failed = true;
    this.end("broken off");
    if (!this.text) this.meta.remove();
    this.element.append(element("p", { class: "fault", role: "alert" }, message));
  }
}

/** What the row says. */
export class Reference extends Text {
  constructor(text, values) {
    super(values);
    this.text = text;
    this.element = element("section", { class: "answer wanted", "aria-label": "Reference answer" }, element("h3", {}, "Reference answer"), this.place);
    this.draw();
  }
}
