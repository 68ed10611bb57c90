"use strict";

const MOST_TOKENS = 4000; // of an answer that are shown at once
const LONGEST_TEXT = 200; // characters of a token
const MOST_CELLS = 4e6; // of a table that compares two answers
const HINT = "Point at a token, or go to it with Tab, ← and →: its numbers stand here.";
const at = (id) => document.getElementById(id);
const { groups, prompts, tokens: texts, special } = JSON.parse(at("data").textContent);

function add(parent, kind, className, text) { // texts of models are texts, and never HTML
  const element = document.createElement(kind);
  if (className) element.className = className;
  element.textContent = text;
  parent.append(element);
  return element;
}

function number(value) {
  return value === null || value === undefined ? "–" : String(Number(value.toPrecision(4))).replace("-", "−");
}

// ---- What tokens look like
const escaped = (c) => (c === "\n" ? "⏎\n" : c === "\t" ? "⇥\t" : `\\u{${c.codePointAt(0).toString(16)}}`);
const UNSEEN = /[\p{C}\u2028\u2029]/gu;
const start = (text, length) => (text.length > length ? `${text.slice(0, length)}…` : text);
const visible = (text) => start(text, LONGEST_TEXT).replace(UNSEEN, escaped);
const visibleLong = (text) => text.replace(UNSEEN, (c) => (c === "\n" || c === "\t" ? c : escaped(c)));
const UTF8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
const hex = (byte) => `\\x${byte.toString(16).padStart(2, "0")}`;

function character(bytes) { // the one that they begin with, and its length in bytes; undefined where there is none
  const length = bytes[0] < 0x80 ? 1 : bytes[0] < 0xe0 ? 2 : bytes[0] < 0xf0 ? 3 : 4;
  if (bytes.length < length) return undefined;
  try {
    return [UTF8.decode(Uint8Array.from(bytes.slice(0, length))), length];
  } catch {
    return undefined;
  }
}

function piecesOf(ids) { // [what each token shows]; a character of several tokens stands in the last of them
  const pieces = ids.map((id) => special[id] ?? texts[id] ?? ` ${id}`);
  for (let n = 0; n < ids.length; n++) {
    if (!Array.isArray(pieces[n])) continue;
    const bytes = [], owners = []; // of a stretch of tokens that are no whole characters
    let end = n;
    for (; Array.isArray(pieces[end]); end++) {
      bytes.push(...pieces[end]);
      owners.push(...pieces[end].map(() => end));
    }
    pieces.fill("", n, end);
    for (let i = 0; i < bytes.length;) {
      const [text, length] = character(bytes.slice(i, i + 4)) ?? [hex(bytes[i]), 1];
      pieces[owners[i + length - 1]] += text;
      i += length;
    }
    for (let i = n; i < end; i++) pieces[i] ||= "·";
    n = end - 1;
  }
  return pieces;
}

function callsOf(ids) { // of each token, whether it is part of a tool call
  let inside = false;
  return ids.map((id) => {
    if (special[id] === "<|python_start|>") inside = true;
    const part = inside;
    if (special[id] === "<|python_end|>") inside = false;
    return part;
  });
}

// ---- Colours
const largest = (group) => Math.max(...group.answers.map((answer) => Math.abs(answer.advantage ?? 0)));
const colours = { // of a sampled token: [class, strength from 0 to 1], or nothing
  logprobs({ logprobs }, n) {
    return logprobs[n] === null ? null : ["low", 1 - Math.exp(Math.min(0, logprobs[n]))];
  },
  advantage({ advantage }, n, group) {
    return advantage && [advantage > 0 ? "high" : "low", Math.abs(advantage) / largest(group)];
  },
  mask: () => ["high", 0.6],
};
const scales = { // what explains them: [text, class, strength]
  logprobs: () => [["probability 100 %", "", 0], ["50 %", "low", 0.5], ["0 %", "low", 1]],
  advantage(group) {
    const most = number(largest(group));
    if (most === "0") return [["no answer has an advantage", "", 0]];
    return [[`advantage −${most}`, "low", 1], ["0", "", 0], [`+${most}`, "high", 1]];
  },
  mask: () => [["sampled: trained on", "high", 0.6]],
};

function paint(element, [className, weight]) {
  if (className) element.classList.add(className);
  element.style.setProperty("--weight", weight);
}

// ---- Which answers are shown
const kinds = {
  wrong: (answer) => !(answer.reward > 0),
  cut: (answer) => answer.ended === false,
  failed: (answer) => answer.tools.some((call) => call.result === null),
};
const isWanted = (answer) => Object.keys(kinds).every((kind) => !at(kind).checked || kinds[kind](answer));
const mean = (group) => {
  const rewards = group.answers.map((answer) => answer.reward).filter((reward) => reward !== null);
  return rewards.length ? number(rewards.reduce((a, b) => a + b) / rewards.length) : "–";
};
let chosen = groups[0], wanted = groups; // the group that is shown, and those that have an answer that is wanted

function fill(select, options, value) { // options: [value, text]
  select.replaceChildren(...options.map(([value, text]) => new Option(text, value)));
  select.value = value;
  select.disabled = !options.length;
}

function earlierOf(group) { // groups of the same problem, the newest first
  const isOfProblem = (one) => one.prompt === group.prompt && one.example === group.example;
  return groups.filter((one) => one.step < group.step && isOfProblem(one)).reverse();
}

function choose(group) {
  wanted = groups.filter((one) => one.answers.some(isWanted));
  chosen = wanted.includes(group) ? group : wanted.find((one) => one.step >= group?.step) ?? wanted.at(-1);
  const steps = [...new Set(wanted.map((one) => one.step))];
  fill(at("step"), steps.map((step) => [step, step.toLocaleString("en")]), chosen?.step);
  const ofStep = wanted.filter((one) => one.step === chosen?.step);
  const title = (one) => `${one.example}: ${visible(start(prompts[one.prompt].replace(/<\|\w+\|>/g, ""), 60))}`;
  fill(at("problem"), ofStep.map((one) => [wanted.indexOf(one), title(one)]), wanted.indexOf(chosen));
  const others = chosen ? earlierOf(chosen) : [];
  const none = others.length ? "nothing" : "no earlier step has this problem";
  fill(at("earlier"), [["", none], ...others.map((one) => [one.step, `step ${one.step.toLocaleString("en")}`])], "");
  at("earlier").disabled = !others.length;
  const place = wanted.indexOf(chosen);
  at("before").disabled = place <= 0;
  at("after").disabled = place < 0 || place === wanted.length - 1;
  show();
}

// ---- The answers to a problem
function show() {
  at("answers").replaceChildren();
  at("scale").replaceChildren();
  at("numbers").textContent = HINT;
  at("prompt").textContent = chosen ? visibleLong(prompts[chosen.prompt]) : "";
  if (!chosen) {
    at("found").textContent = groups.length ? "No answer is like that." : "The file has no answers yet.";
    return;
  }
  const shown = chosen.answers.filter(isWanted);
  const before = at("earlier").value && earlierOf(chosen).find((one) => one.step === Number(at("earlier").value));
  const said = (group) => `${group.answers.length} answers, mean reward ${mean(group)}`;
  at("found").textContent = said(chosen)
    + (shown.length < chosen.answers.length ? `; ${shown.length} of them shown` : "")
    + (before ? `. At step ${before.step.toLocaleString("en")}: ${said(before)}` : "");
  at("differences").hidden = !before;
  for (const [text, ...colour] of scales[at("colour").value](chosen)) paint(add(at("scale"), "span", "", text), colour);
  at("answers").append(...shown.map((answer) => card(answer, before)));
  try {
    const url = new URL(location);
    url.hash = `step=${chosen.step}&problem=${chosen.example}`;
    history.replaceState(null, "", url);
  } catch { /* a frame whose address may not change */ }
}

function card(answer, before) {
  const article = document.createElement("article");
  article.classList.toggle("right", answer.reward > 0);
  add(article, "h2", "", `answer ${answer.sample ?? "?"}: reward ${number(answer.reward)}`);
  const facts = [`advantage ${number(answer.advantage)}`, `${answer.tokens.length.toLocaleString("en")} tokens`];
  if (answer.ended === false) facts.push("cut");
  add(article, "p", "", facts.join(", "));
  if (answer.text !== undefined) add(article, "div", "tokens", visibleLong(answer.text));
  const other = before && mostAlike(answer, before.answers);
  const line = add(article, "div", "tokens", "");
  line.answer = answer;
  fillTokens(line, answer, other, MOST_TOKENS);
  const alike = `compared with the most alike of step ${before?.step}: answer ${other?.sample ?? "?"}`;
  if (other) add(article, "p", "", alike);
  for (const { call, result, late } of answer.tools) {
    const outcome = result !== null ? `= ${visible(result)}` : late ? "took too long" : "has no result";
    add(article, "p", result === null ? "bad" : "", `${visible(call ?? "")} ${outcome}`);
  }
  return article;
}

function fillTokens(line, answer, other, most) {
  const ids = answer.tokens.slice(0, most), pieces = piecesOf(ids), calls = callsOf(ids);
  const colour = colours[at("colour").value], gone = other ? differences(other.tokens, answer.tokens) : null;
  const removed = (n) => {
    if (gone?.removed[n]) add(line, "del", "", piecesOf(gone.removed[n]).map(visible).join(""));
  };
  line.replaceChildren();
  ids.forEach((id, n) => {
    removed(n);
    const token = add(line, "span", "token", visible(pieces[n]));
    const sampled = answer.mask[n] !== "0", painted = sampled && colour(answer, n, chosen);
    token.number = n;
    token.tabIndex = n ? -1 : 0;
    token.classList.toggle("forced", !sampled);
    token.classList.toggle("call", calls[n]);
    token.classList.toggle("special", id in special);
    token.classList.toggle("odd", Array.isArray(texts[id]) && /^(\\x..|·)/.test(pieces[n]));
    token.classList.toggle("new", Boolean(gone?.added[n]));
    if (painted) paint(token, painted);
  });
  if (answer.tokens.length <= most) removed(answer.tokens.length);
  else {
    const more = add(line, "button", "", `show all ${answer.tokens.length.toLocaleString("en")} tokens`);
    more.addEventListener("click", () => fillTokens(line, answer, other, Infinity));
  }
}

// ---- Differences to an answer of an earlier step
function mostAlike(answer, others) { // the one that has most tokens in common, wherever they stand
  let best = others[0], most = -Infinity;
  for (const other of others) {
    const left = new Map();
    for (const id of other.tokens) left.set(id, (left.get(id) ?? 0) + 1);
    let common = 0;
    for (const id of answer.tokens) {
      if (left.get(id)) {
        common++;
        left.set(id, left.get(id) - 1);
      }
    }
    const alike = 2 * common - other.tokens.length + (other.sample === answer.sample ? 0.5 : 0);
    if (alike > most) [best, most] = [other, alike];
  }
  return best;
}

function differences(before, now) { // added: of each token of `now`; removed: place in `now` -> tokens of `before`
  const added = new Array(now.length).fill(false), removed = {};
  let first = 0, last = 0; // tokens in common at both ends
  while (first < Math.min(before.length, now.length) && before[first] === now[first]) first++;
  while (last < Math.min(before.length, now.length) - first && before.at(-1 - last) === now.at(-1 - last)) last++;
  const a = before.slice(first, before.length - last), b = now.slice(first, now.length - last);
  const width = b.length + 1, isLong = (a.length + 1) * width > MOST_CELLS; // then all of it is taken for changed
  const common = new Uint16Array(isLong ? 0 : (a.length + 1) * width); // tokens in common from here to the end
  for (let i = a.length - 1; i >= 0 && !isLong; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      common[i * width + j] = a[i] === b[j] ? common[(i + 1) * width + j + 1] + 1
        : Math.max(common[(i + 1) * width + j], common[i * width + j + 1]);
    }
  }
  for (let i = 0, j = 0; i < a.length || j < b.length;) {
    if (!isLong && i < a.length && j < b.length && a[i] === b[j]) { i++; j++; }
    else if (i < a.length && (j === b.length || isLong || common[(i + 1) * width + j] >= common[i * width + j + 1])) {
      (removed[first + j] ??= []).push(a[i++]);
    } else added[first + j++] = true;
  }
  return { added, removed };
}

// ---- The numbers of a token
function showNumbers(token) {
  const { answer } = token.parentElement, n = token.number, id = answer.tokens[n], forced = answer.mask[n] === "0";
  const chance = (value) => (value === null ? "–" : `${number(value)} (${number(100 * Math.exp(value))} %)`);
  const text = special[id] ?? (Array.isArray(texts[id]) ? texts[id].map(hex).join("") : texts[id]);
  at("numbers").replaceChildren();
  for (const [name, value] of [
    ["token", `${(n + 1).toLocaleString("en")} of ${answer.tokens.length.toLocaleString("en")}`],
    ["id", String(id)],
    ["text", text === undefined ? null : visible(text)],
    ["log-probability", forced ? "–" : chance(answer.logprobs[n])],
    ["the model's own", forced ? "–" : chance(answer.policy[n])],
    ["mask", { 0: "0, forced", 1: "1, sampled" }[answer.mask[n]] ?? "–"],
    ["advantage", `${number(answer.advantage)}${forced ? ", not trained on" : ""}`],
  ]) {
    if (value === null) continue;
    const item = add(at("numbers"), "span", "", "");
    add(item, "b", "", `${name} `);
    add(item, name === "text" ? "code" : "span", "", value);
  }
}

for (const kind of ["pointerover", "focusin"]) {
  at("answers").addEventListener(kind, (event) => {
    if (event.target.classList.contains("token")) showNumbers(event.target);
  });
}
at("answers").addEventListener("pointerdown", (event) => {
  if (event.target.classList.contains("token")) reach(event.target);
});
at("answers").addEventListener("keydown", (event) => {
  if (!event.target.classList.contains("token") || event.ctrlKey || event.metaKey || event.altKey) return;
  const all = [...event.target.parentElement.querySelectorAll(".token")], n = all.indexOf(event.target);
  const next = { ArrowLeft: all[n - 1], ArrowRight: all[n + 1], Home: all[0], End: all.at(-1) }[event.key];
  if (!next) return;
  event.preventDefault();
  reach(next);
  next.focus();
});

function reach(token) { // the one of its answer that Tab goes to
  for (const other of token.parentElement.querySelectorAll(".token[tabindex='0']")) other.tabIndex = -1;
  token.tabIndex = 0;
}

// ---- What a reader chooses
at("step").addEventListener("change", () => choose(wanted.find((one) => one.step === Number(at("step").value))));
at("problem").addEventListener("change", () => choose(wanted[Number(at("problem").value)]));
at("before").addEventListener("click", () => choose(wanted[wanted.indexOf(chosen) - 1]));
at("after").addEventListener("click", () => choose(wanted[wanted.indexOf(chosen) + 1]));
for (const id of Object.keys(kinds)) at(id).addEventListener("change", () => choose(chosen ?? groups.at(-1)));
for (const id of ["colour", "earlier"]) at(id).addEventListener("change", show);

const linked = new URLSearchParams(location.hash.slice(1));
const isLinked = (one) => `${one.step} ${one.example}` === `${linked.get("step")} ${linked.get("problem")}`;
choose(groups.find(isLinked) ?? groups.at(-1));
