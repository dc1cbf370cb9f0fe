"use strict";
// Talks to its own server alone, by the same routes as any OpenAI client. Text of the model is never taken for HTML.
const $ = (id) => document.getElementById(id);
let token = "", chat = false, conversation = [], running = null, watching = 0, aging = 0, verified = "";

function headers() { return { "Authorization": `Bearer ${token}`, "Content-Type": "application/json" }; }

async function failure(response) {
  try { return (await response.json()).error.message; } catch { return `the server answered ${response.status}`; }
}

function list(id, texts) {
  $(id).replaceChildren(...(texts.length ? texts : ["nothing"]).map((text) => {
    const item = document.createElement("li");
    item.textContent = text;
    return item;
  }));
}

function attestation(found) {
  $("attested").textContent = !found
    ? "the server's own process, not attested: its machine's owner could read all of it"
    : `${found.summary} Verified ${found.age} s ago, and again before each message.`;
  $("attested").className = "";
  $("verified").hidden = !found;
  const said = JSON.stringify([found?.rules, found?.measurements]);
  if (!found || said === verified) return; // else whoever reads or copies them would lose the place
  verified = said;
  list("rules", found.rules.map((rule) =>
    `${rule.passed === null ? "not judged" : rule.passed ? "ok" : "FAILED"}: ${rule.name}: ${rule.got}`));
  list("measurements", Object.entries(found.measurements).map(([name, value]) => `${name} ${value}`));
}

async function age() { // the evidence is renewed, by each message and while there is none
  clearTimeout(aging);
  const response = await fetch("v1/protection", { headers: headers() }).catch(() => null);
  if (response?.ok) {
    attestation((await response.json()).attested);
  } else {
    $("attested").textContent = "NOT VERIFIED any more: the session has ended, or connect cannot be reached.";
    $("attested").className = "error";
    $("verified").hidden = true;
  }
  aging = setTimeout(age, 2000);
}

async function watch() {
  clearTimeout(watching);
  const response = await fetch("v1/job", { headers: headers() }).catch(() => null);
  if (!response || response.status === 404) return;
  $("progress").hidden = false;
  if (response.ok) {
    const job = await response.json();
    $("status").textContent = `${job.status}, ${job.queries} of ${job.max_queries} queries used`;
    $("bar").max = job.steps || 1;
    $("bar").value = job.step;
    $("bar").textContent = `${job.step} of ${job.steps} steps`;
    if (["done", "failed", "refused"].includes(job.status)) return;
  } else { // an enclave that is away may come back, and a job that it does not know may still be handed in
    $("status").textContent = await failure(response);
  }
  clearTimeout(watching); // of another look, which began while this one waited
  watching = setTimeout(watch, 2000);
}

async function open() {
  $("entry-error").textContent = "";
  const response = await fetch("v1/protection", { headers: headers() }).catch(() => null);
  if (!response || !response.ok) {
    $("entry").hidden = false;
    $("chat").hidden = true;
    $("entry-error").textContent = !response ? "the server cannot be reached" : token ? await failure(response) : "";
    $("token").focus();
    return;
  }
  sessionStorage.setItem("token", token);
  const about = await response.json();
  chat = about.chat;
  $("prompt-label").textContent = chat ? "Message" : "Text to go on with (this model has no chat template)";
  attestation(about.attested);
  clearTimeout(aging);
  if (about.attested) aging = setTimeout(age, 2000);
  $("profile").textContent = `${about.profile}: ${about.summary}`;
  $("audience").textContent = about.audience;
  $("workers").textContent = about.workers.join(", ") || "none";
  list("hidden", about.hidden);
  list("shown", about.shown);
  $("model").replaceChildren(...about.models.map((name) => new Option(name, name, false, name === about.default)));
  watch();
  $("entry").hidden = true;
  $("chat").hidden = false;
  $("prompt").focus();
}

function say(role, text) {
  const item = document.createElement("li");
  item.className = role;
  item.textContent = text;
  $("messages").append(item);
  item.scrollIntoView({ block: "nearest" });
  return item;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the answer was cut off");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      if (line === "data: [DONE]") return;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message || event.error);
      yield event;
    }
  }
}

function busy(is) {
  $("send").disabled = is;
  $("stop").disabled = !is;
  $("messages").setAttribute("aria-busy", is);
}

async function ask(prompt) {
  $("error").textContent = "";
  busy(true);
  running = new AbortController();
  const before = conversation;
  conversation = [...before, { role: "user", content: prompt }];
  const question = say("user", prompt), answer = say("assistant", "");
  const body = { model: $("model").value, max_tokens: Number($("longest").value), stream: true };
  Object.assign(body, chat ? { messages: conversation } : { prompt });
  let text = "";
  try {
    const response = await fetch(chat ? "v1/chat/completions" : "v1/completions",
      { method: "POST", headers: headers(), body: JSON.stringify(body), signal: running.signal });
    if (!response.ok) throw new Error(await failure(response));
    for await (const event of events(response)) {
      const choice = event.choices[0];
      text += (chat ? choice?.delta?.content : choice?.text) || "";
      answer.textContent = text;
    }
  } catch (error) {
    if (error.name !== "AbortError") $("error").textContent = error.message;
  }
  const cleared = !question.isConnected; // by "New conversation": what it cleared must not come back unseen
  if (text && !cleared) {
    conversation = [...conversation, { role: "assistant", content: text }];
  } else if (!cleared) { // as if it had not been asked
    conversation = before;
    question.remove();
    answer.remove();
    $("prompt").value ||= prompt;
  }
  busy(false);
  $("prompt").focus();
  if (!$("progress").hidden) watch();
  if (!$("verified").hidden) age();
}

$("entry").addEventListener("submit", (event) => {
  event.preventDefault();
  token = $("token").value.trim();
  open();
});
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const prompt = $("prompt").value;
  if ($("send").disabled || !prompt.trim()) return;
  $("prompt").value = "";
  ask(prompt);
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("ask").requestSubmit();
});
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", () => {
  running?.abort();
  conversation = [];
  $("messages").replaceChildren();
  $("error").textContent = "";
});

// The link that the server prints has the token behind "#", which no browser sends to a server.
const link = new URLSearchParams(location.hash.slice(1)).get("token");
if (link) history.replaceState(null, "", location.pathname);
token = link || sessionStorage.getItem("token") || "";
open();
