/** A conversation: what was asked, by whom it was answered, and what differs. */
import { Answer, Reference, takingAlong } from "./answer.js";
import { element, oneLine } from "./elements.js";
import { answer, body, ProtocolError } from "./protocol.js";
import { differences } from "./words.js";

export class Conversation {
  /**
   * @param {Element} place where the turns go
   * @param {{values: () => object, key: () => string, template: (model: string) => boolean,
   *   changed: () => void, say: (text: string) => void, refused: () => void}} page what is around it: the
   *   settings and the API key of now, whether a model has a chat template; told when it begins or ends to
   *   answer, of what is to be read out, and that the key was refused
   */
  constructor(place, page) {
    Object.assign(this, { place, page, turns: [], stopper: null });
  }

  /** Whether answers are coming. */
  get busy() {
    return this.stopper !== null;
  }

  /**
   * Ask, and show what comes.
   * @param {string} prompt
   * @param {{answer?: string | null, alone?: boolean, chat?: boolean, system?: string}} question the reference
   *   answer; whether nothing before counts; how a run asks it: in a conversation or as it stands, and with which
   *   system message
   */
  async ask(prompt, { answer: wanted = null, alone = false, chat, system } = {}) {
    const { mode, model, with: other } = this.page.values();
    const models = mode === "compare" ? [model, other] : [model];
    const turn = new Turn(prompt, models, wanted, this.page.values, alone || this.turns.length === 0, this.turns.length + 1);
    Object.assign(turn, { chat, system });
    this.turns.push(turn);
    this.place.append(turn.element);
    const stopper = (this.stopper = new AbortController());
    this.page.changed();
    turn.element.scrollIntoView({ block: "start" });
    await Promise.all(turn.answers.map((one, side) => this.#fill(one, side, stopper.signal)));
    takingAlong(() => turn.compare());
    if (this.stopper === stopper) this.stopper = null;
    this.page.changed();
    this.page.say(turn.answers.map((one) => `${one.model}: ${one.failed ? "no answer" : oneLine(one.text, 400)}`).join(". "));
  }

  async #fill(one, side, signal) {
    const inForm = (this.turns.at(-1).chat ?? this.page.values().form === "chat") && this.page.template(one.model);
    const asked = body(one.model, inForm, this.#messages(side), this.page.values());
    try {
      for await (const part of answer(asked, { key: this.page.key(), signal })) one.add(part);
      takingAlong(() => one.end());
    } catch (fault) {
      if (fault.name === "AbortError" || signal.aborted) return takingAlong(() => one.end("stopped"));
      const told = fault instanceof ProtocolError ? fault.message : `The page has a fault: ${fault.message}`;
      takingAlong(() => one.fail(oneLine(told)));
      if (fault.status === 401) this.page.refused();
    }
  }

  /** What has been said since the last beginning, with the answers of one side. */
  #messages(side) {
    const begun = this.turns.findLastIndex((turn) => turn.begins);
    const system = this.turns[begun].system ?? this.page.values().system;
    const said = system ? [{ role: "system", content: system }] : [];
    this.turns.slice(begun).forEach((turn, i, all) => {
      const before = turn.answers[side] ?? turn.answers[0];
      if (i < all.length - 1 && (before.failed || !before.text)) return;
      said.push({ role: "user", content: turn.prompt });
      if (i < all.length - 1) said.push({ role: "assistant", content: before.text });
    });
    return said;
  }

  /** End the answers that are coming; what came stays. */
  stop() {
    this.stopper?.abort();
  }

  /** Begin anew. */
  clear() {
    this.stop();
    this.turns = [];
    this.place.replaceChildren();
  }

  /** Draw everything again, after a setting of the view has changed. */
  redraw() {
    for (const turn of this.turns) turn.compare();
  }
}

/** A question with its answers. */
class Turn {
  constructor(prompt, models, wanted, values, begins, number) {
    Object.assign(this, { prompt, values, begins });
    this.answers = models.map((model, side) => new Answer(model, side, values));
    this.wanted = wanted === null ? null : new Reference(wanted, values);
    this.legend = element("p", { class: "legend", hidden: true });
    const cards = [...this.answers, ...(this.wanted ? [this.wanted] : [])].map((one) => one.element);
    this.element = element(
      "article", { class: "turn", "aria-label": `Question ${number}` },
      begins && number > 1 ? element("p", { class: "beginning" }, "New conversation: nothing above counts") : null,
      element("h2", { class: "hidden" }, `Question ${number}`),
      element("div", { class: "asked", dir: "auto" }, prompt.trim()),
      element("div", { class: "answers", "data-count": cards.length }, ...cards),
      this.legend,
    );
  }

  /** Mark what differs, by the setting. */
  compare() {
    if (this.answers.some((one) => one.place.getAttribute("aria-busy") === "true")) return;
    const { marks } = this.values();
    const [one, other] = this.answers;
    for (const each of this.answers) each.exact.hidden = each.failed || each.text.trim() !== this.wanted?.text.trim();
    for (const text of [...this.answers, this.wanted]) if (text) text.marks = [];
    let told = null;
    if (marks === "other" && other) {
      if (!one.failed && !other.failed) told = this.#mark(one, other, "Marked: words that only one of the two answers has.");
    } else if (marks !== "none" && this.wanted) {
      for (const each of this.answers) each.marks = differences(each.text, this.wanted.text).a;
      if (!other) this.wanted.marks = differences(one.text, this.wanted.text).b;
      told = this.answers.every((each) => !each.exact.hidden) ? null : "Marked: words that differ from the reference answer.";
    }
    this.legend.textContent = told ?? "";
    this.legend.hidden = told === null;
    for (const text of [...this.answers, this.wanted]) if (text?.text) text.draw();
  }

  #mark(one, other, told) {
    const { a, b } = differences(one.text, other.text);
    [one.marks, other.marks] = [a, b];
    return a.length || b.length ? told : "Both answers are the same, word for word.";
  }
}
