/** Elements: the one way in which this page makes any. Text is text; nothing is ever parsed as markup. */

/**
 * An element.
 * @param {string} name of it
 * @param {Record<string, string | number | boolean | null | undefined>} attributes true is one without a
 *   value; false, null and undefined are none
 * @param {...(Node | string | null)} children strings become text
 */
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== false && value !== null && value !== undefined) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null).map((child) => (typeof child === "string" ? shown(child) : child)));
  return made;
}

/** The element of index.html with an id. */
export const byId = (id) => document.getElementById(id);

/** A text with control characters and marks that turn its direction made visible, as the report has them. */
export function shown(text) {
  return text.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069]/g, (c) =>
    c === "\r" ? "" : `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`,
  );
}

/** A text in one line of bounded length. */
export function oneLine(text, most = 300) {
  const line = String(text).replace(/\s+/g, " ").trim();
  return line.length > most ? `${line.slice(0, most - 1)}…` : line;
}
