/** What the page says to the server: the OpenAI protocol, streamed. */

const MOST_LINE = 1 << 22; // characters of an event; beyond that the stream is not of this protocol
export const ALTERNATIVES = 4; // beside each token

/** Something that the server, or the way to it, has against a request. */
export class ProtocolError extends Error {
  /**
   * @param {string} message in one line
   * @param {number} status of HTTP, 0 where there was no answer
   */
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** A document of the server's, as JSON. */
export async function get(path, key) {
  return (await request(path, { headers: headers(key) })).json();
}

/**
 * The parts of an answer as they come: {text, tokens, finish, tokensUsed}, where each token is
 * {text, logprob, top: [{text, logprob}]}.
 * @param {object} asked what {@link body} made
 * @param {{key: string, signal: AbortSignal}} options the API key, or an empty text; what ends it
 */
export async function* answer(asked, { key, signal }) {
  const path = "messages" in asked ? "/v1/chat/completions" : "/v1/completions";
  const sent = { ...headers(key), "Content-Type": "application/json" };
  const response = await request(path, { method: "POST", headers: sent, body: JSON.stringify(asked), signal });
  let finished = false;
  try {
    for await (const event of events(response.body)) {
      if (event === "[DONE]") return;
      const part = read(event);
      finished ||= part.finish !== null;
      yield part;
    }
  } catch (fault) {
    if (fault instanceof ProtocolError || fault.name === "AbortError") throw fault;
    throw new ProtocolError("The answer broke off: the connection to the server was lost.");
  }
  if (!finished) throw new ProtocolError("The answer broke off: the server ended it without a reason.");
}

/**
 * What is sent for an answer.
 * @param {string} model its id
 * @param {boolean} template whether it has a chat template; without one the prompt goes as it stands
 * @param {{role: string, content: string}[]} messages the last one is the prompt
 * @param {object} values the settings
 */
export function body(model, template, messages, values) {
  const common = {
    model,
    stream: true,
    stream_options: { include_usage: true },
    temperature: values.temperature,
    top_p: values.top_p,
    max_tokens: values.max_tokens,
    ...(values.seed === null ? {} : { seed: values.seed }),
  };
  return template
    ? { ...common, messages, logprobs: true, top_logprobs: ALTERNATIVES }
    : { ...common, prompt: messages.at(-1).content, logprobs: ALTERNATIVES };
}

const headers = (key) => (key ? { Authorization: `Bearer ${key}` } : {});

async function request(path, options) {
  let response;
  try {
    response = await fetch(path, { ...options, credentials: "omit", redirect: "error", referrerPolicy: "no-referrer" });
  } catch (fault) {
    if (fault.name === "AbortError") throw fault;
    throw new ProtocolError("The server cannot be reached. Is mlxlora serve still running?");
  }
  if (response.ok) return response;
  const said = await response.json().then((value) => value?.error?.message, () => null);
  const wait = response.headers.get("Retry-After");
  const again = wait && /^\d+$/.test(wait) ? ` Try again in ${wait} s.` : "";
  const message = typeof said === "string" && said ? said : `The server answered ${response.status} ${response.statusText}`;
  throw new ProtocolError(again ? message.replace(/\.?$/, `.${again}`) : message, response.status);
}

/** The data of each server-sent event. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      if (rest.length > MOST_LINE) throw new ProtocolError("The server's answer is no stream of events.");
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** What an event says. */
function read(event) {
  let value;
  try {
    value = JSON.parse(event);
  } catch {
    throw new ProtocolError("The server sent an event that is no JSON.");
  }
  if (value?.error) throw new ProtocolError(String(value.error.message ?? value.error));
  const choice = value?.choices?.[0];
  const text = choice?.delta?.content ?? choice?.text ?? "";
  return {
    text: typeof text === "string" ? text : "",
    tokens: choice?.logprobs ? tokens(choice.logprobs) : [],
    finish: choice?.finish_reason ?? null,
    tokensUsed: value?.usage?.completion_tokens ?? null,
  };
}

function tokens(logprobs) {
  if (Array.isArray(logprobs.content)) {
    return logprobs.content.map((token) => ({ ...entry(token), top: (token.top_logprobs ?? []).map(entry) }));
  }
  return (logprobs.tokens ?? []).map((text, i) => ({
    text: String(text),
    logprob: logprobs.token_logprobs?.[i] ?? null,
    top: Object.entries(logprobs.top_logprobs?.[i] ?? {})
      .map(([other, logprob]) => ({ text: other, logprob }))
      .sort((a, b) => b.logprob - a.logprob),
  }));
}

const entry = (token) => ({ text: String(token.token), logprob: token.logprob });
