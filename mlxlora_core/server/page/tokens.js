/** Where the tokens of an answer stand in its text. */

const AHEAD = 32; // characters that tokens without a text of their own may stand for

/**
 * The places of tokens, in order: {start, end, first, last} says that text[start:end] is of the tokens first to last.
 *
 * A token is mostly a part of the text. Some are not: the bytes of a character that several tokens make, a
 * space that is left out at the beginning. What stands up to the next token that is found is theirs together.
 * @param {string} text
 * @param {{text: string}[]} tokens
 */
export function places(text, tokens) {
  const found = [];
  let at = 0;
  let open = 0; // the first token that has no place yet
  tokens.forEach((token, i) => {
    const start = token.text ? text.slice(at, at + token.text.length + (open < i ? AHEAD : 0)).indexOf(token.text) : -1;
    if (start < 0 || (start > 0 && open === i)) return;
    if (open < i) found.push({ start: at, end: at + start, first: open, last: i - 1 });
    at += start;
    found.push({ start: at, end: at + token.text.length, first: i, last: i });
    at += token.text.length;
    open = i + 1;
  });
  if (open < tokens.length && at < text.length) found.push({ start: at, end: text.length, first: open, last: tokens.length - 1 });
  return found.filter(({ start, end }) => end > start);
}

/** The index of the range that holds an offset, or of the first one behind it; ranges are sorted. */
export function holding(ranges, offset, endOf) {
  let low = 0;
  let high = ranges.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (endOf(ranges[middle]) > offset) high = middle;
    else low = middle + 1;
  }
  return low;
}
