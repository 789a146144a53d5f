/** Which words of two texts differ: those outside a longest common subsequence. */

const MOST_CELLS = 4_000_000; // of the table: two texts of 2000 words whose beginnings and ends differ
const WORD = /[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Thai}]|[\p{L}\p{M}\p{N}_]+|[^\s\p{L}\p{M}\p{N}_]/gu;

/**
 * The ranges of each text that the other does not have.
 *
 * A word is a run of letters, digits and underscores; a mark, and a character of a script without spaces,
 * are words of their own. Where the table of the subsequence would be too large, a word in the middle that
 * stands anywhere in the other's middle counts as common.
 * @param {string} a
 * @param {string} b
 * @returns {{a: [number, number][], b: [number, number][]}} from and to in UTF-16 units
 */
export function differences(a, b) {
  const [x, y] = [split(a), split(b)];
  let head = 0;
  while (head < x.length && head < y.length && x[head].word === y[head].word) head++;
  let tail = 0;
  const most = Math.min(x.length, y.length) - head;
  while (tail < most && x[x.length - 1 - tail].word === y[y.length - 1 - tail].word) tail++;
  const [p, q] = [x.slice(head, x.length - tail), y.slice(head, y.length - tail)];
  (p.length * q.length > MOST_CELLS ? keepAnywhere : keepCommon)(p, q);
  return { a: ranges(p, a), b: ranges(q, b) };
}

function split(text) {
  return [...text.matchAll(WORD)].map((found) => ({
    word: found[0], start: found.index, end: found.index + found[0].length, kept: false,
  }));
}

/** Keep the words of a longest common subsequence. */
function keepCommon(p, q) {
  const wide = q.length + 1;
  const length = new Uint16Array((p.length + 1) * wide);
  for (let i = p.length - 1; i >= 0; i--) {
    for (let j = q.length - 1; j >= 0; j--) {
      length[i * wide + j] =
        p[i].word === q[j].word
          ? length[(i + 1) * wide + j + 1] + 1
          : Math.max(length[(i + 1) * wide + j], length[i * wide + j + 1]);
    }
  }
  for (let i = 0, j = 0; i < p.length && j < q.length; ) {
    if (p[i].word === q[j].word) p[i++].kept = q[j++].kept = true;
    else if (length[(i + 1) * wide + j] >= length[i * wide + j + 1]) i++;
    else j++;
  }
}

function keepAnywhere(p, q) {
  const [inP, inQ] = [p, q].map((words) => new Set(words.map(({ word }) => word)));
  for (const one of p) one.kept = inQ.has(one.word);
  for (const one of q) one.kept = inP.has(one.word);
}

/** Words that are not kept; neighbours in a line become one range with what is between them. */
function ranges(words, text) {
  const found = [];
  words.forEach(({ start, end, kept }, i) => {
    if (kept) return;
    const before = words[i - 1];
    if (before && !before.kept && !text.slice(before.end, start).includes("\n")) found.at(-1)[1] = end;
    else found.push([start, end]);
  });
  return found;
}
