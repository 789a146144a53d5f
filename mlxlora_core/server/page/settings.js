/** The settings, which are kept in the address behind the #: it can be shared, and the server never sees it. */

const LONGEST = 8000; // characters of a text in the address
const number = (low, high, whole = false) => (text) => {
  const value = text.trim() === "" ? NaN : Number(text);
  return value >= low && value <= high && (!whole || Number.isInteger(value)) ? value : undefined;
};
const oneOf = (...names) => (text) => (names.includes(text) ? text : undefined);
const words = (text) => (text.length <= LONGEST ? text : undefined);
const seed = number(0, 2 ** 32 - 1, true);

/** name -> what reads it; undefined is no value of it */
const READERS = {
  mode: oneOf("chat", "compare"),
  model: words,
  with: words,
  form: oneOf("chat", "plain"),
  system: words,
  frame: (text) => (text.includes("{}") ? words(text) : undefined),
  temperature: number(0, 2),
  top_p: number(0.01, 1),
  max_tokens: number(1, 1 << 17, true),
  seed: (text) => (text === "" ? null : seed(text)),
  marks: oneOf("other", "reference", "none"),
  view: oneOf("markdown", "plain"),
  unsure: oneOf("hidden", "shown"),
};

export const NAMES = Object.keys(READERS);

/** The value of a setting that a text stands for, or undefined. */
export const read = (name, text) => READERS[name](text);

/**
 * The settings of an address.
 * @param {string} fragment what stands behind the #
 * @param {object} defaults of those that it does not tell, or tells wrongly
 */
export function fromAddress(fragment, defaults) {
  const found = { ...defaults };
  for (const [name, text] of new URLSearchParams(fragment)) {
    const value = Object.hasOwn(READERS, name) ? read(name, text) : undefined;
    if (value !== undefined) found[name] = value;
  }
  return found;
}

/** What stands behind the # for some settings: those that are not the defaults. */
export function toAddress(values, defaults) {
  const told = NAMES.filter((name) => values[name] !== defaults[name]);
  return new URLSearchParams(told.map((name) => [name, String(values[name] ?? "")])).toString();
}
