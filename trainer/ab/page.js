// The raters' page. Every text comes in through textContent, so nothing of a story is ever read as HTML.

import { RETRY, Saver, TIMEOUT } from "./saving.js";

const CHOICES = ["left", "tie", "right"];
const WORDS = { left: "Left", tie: "Tie", right: "Right" };
const STORED = "minigpt5.ab.rater";

const find = (id) => document.getElementById(id);

let study = null; // what the server said: questions, pairs in this rater's order, answers
let place = { pair: 0, question: 0 };
let moving = 0; // counts the wishes to go to another pair: only the last one is granted
let waiting = false; // for answers to be saved before another pair is shown

// ---- what is answered

const pair = () => study.pairs[place.pair];
const answersOf = (each) => (study.answers[each.pair] ??= {});
const firstOpen = (each) => study.questions.findIndex((question) => !answersOf(each)[question.id]);
const complete = (each) => firstOpen(each) < 0;

function choose(index, choice) {
  const question = study.questions[index];
  const revised = complete(pair());
  answersOf(pair())[question.id] = choice;
  save(question.id, choice);
  const last = index === study.questions.length - 1;
  if (complete(pair()) && (!revised || last)) {
    draw();
    go(revised ? afterwards() : nextOpenPair(), 0);
  } else {
    place.question = revised ? index + 1 : nextOpen(index);
    moving++;
    waiting = false;
    draw();
  }
}

function nextOpen(index) {
  const later = study.questions.findIndex((each, other) => other > index && !answersOf(pair())[each.id]);
  return later < 0 ? firstOpen(pair()) : later;
}

/** The next pair without all answers, from here on and then from the start; the end when there is none. */
function nextOpenPair() {
  const later = study.pairs.findIndex((each, index) => index > place.pair && !complete(each));
  if (later >= 0) return later;
  const open = study.pairs.findIndex((each) => !complete(each));
  return open < 0 ? study.pairs.length : open;
}

/** The next pair, whether answered or not. */
function afterwards() {
  return place.pair + 1 < study.pairs.length ? place.pair + 1 : nextOpenPair();
}

function back() {
  if (place.pair < study.pairs.length && place.question > 0) {
    moving++;
    waiting = false;
    place.question--;
    draw();
  } else if (place.pair > 0) {
    go(place.pair - 1, study.questions.length - 1);
  }
}

/** Shows another pair once all answers are saved: a server that is away could not show its pictures. */
async function go(index, question) {
  const wish = ++moving;
  waiting = true;
  await saver.flush();
  if (wish !== moving || !study) return;
  waiting = false;
  const next = study.pairs[index];
  place = { pair: index, question: question || (next ? Math.max(0, firstOpen(next)) : 0) };
  if (next) show(next);
  draw();
  scrollTo(0, 0);
  find("heading").focus({ preventScroll: true });
}

// ---- saving

function save(question, choice) {
  const answer = { rater: study.rater, pair: pair().pair, question, answer: choice };
  saver.save({ study: study.study, ...answer });
}

const saver = new Saver({
  saved() {
    say("Saved.");
    warn("");
  },
  failed(reason) {
    say("");
    warn(`Not saved yet: ${reason} Trying again; please keep this page open.`);
  },
  refused: stop,
});

function stop(reason) {
  study = null;
  find("study").hidden = true;
  warn(reason);
}

function say(text) {
  find("status").textContent = text;
}

function warn(text) {
  find("alert").textContent = text;
  find("alert").hidden = !text;
}

// ---- what is seen

function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function show(next) {
  for (const side of ["left", "right"]) {
    let count = 0;
    const items = next[side].map((item) =>
      "picture" in item
        ? picture(item.picture, `Picture ${++count} of the ${side} story`)
        : make("p", { textContent: item.text, dir: "auto" }),
    );
    find(side).replaceChildren(...items);
  }
}

function picture(source, alt) {
  const image = make("img", { alt, src: source });
  image.onerror = () => setTimeout(() => image.isConnected && (image.src = `${source}?again=${Date.now()}`), RETRY);
  return image;
}

function buildQuestions() {
  const groups = study.questions.map((question, index) => {
    const buttons = CHOICES.map((choice) => {
      const button = make("button", { type: "button", textContent: WORDS[choice] });
      button.setAttribute("aria-label", `${question.title}: ${WORDS[choice]}`);
      // The second half of a double click may already be on the next pair's button.
      button.onclick = (event) => {
        if (event.detail < 2) choose(index, choice);
      };
      return button;
    });
    const title = make("h3", { textContent: question.title, id: `title-${question.id}` });
    const text = make("p", { textContent: question.text, id: `text-${question.id}` });
    const group = make("div", { className: "question" }, title, text, make("div", { className: "choices" }, ...buttons));
    group.setAttribute("role", "group");
    group.setAttribute("aria-labelledby", `${title.id} ${text.id}`);
    return group;
  });
  find("questions").replaceChildren(...groups);
}

function draw() {
  const total = study.pairs.length;
  const done = study.pairs.filter(complete).length;
  const end = place.pair >= total;
  find("heading").textContent = end ? "Thank you" : `Pair ${place.pair + 1} of ${total}`;
  find("progress").max = total;
  find("progress").value = done;
  find("progress-text").textContent = `${done} of ${total} answered`;
  find("rater").textContent = study.rater;
  find("pair").hidden = find("questions").hidden = find("next").hidden = end;
  find("keys").hidden = end;
  find("done").hidden = !end;
  find("back").disabled = !place.pair;
  if (!end) [...find("questions").children].forEach(drawQuestion);
}

function drawQuestion(group, index) {
  const current = index === place.question;
  if (current) group.setAttribute("aria-current", "step");
  else group.removeAttribute("aria-current");
  const answer = answersOf(pair())[study.questions[index].id];
  group.querySelectorAll("button").forEach((button, number) => {
    button.setAttribute("aria-pressed", String(CHOICES[number] === answer));
  });
}

// ---- keys

document.addEventListener("keydown", (event) => {
  if (!study || event.repeat || event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.key === "Backspace") {
    event.preventDefault();
    back();
    return;
  }
  // By place too: on French keyboards the digits need Shift.
  const digit = /^[123]$/.test(event.key) ? event.key : /^Digit([123])$/.exec(event.code)?.[1];
  if (digit && !waiting && place.pair < study.pairs.length) choose(place.question, CHOICES[digit - 1]);
});

// ---- coming and going

async function start(name) {
  let reply;
  try {
    reply = await fetch(`study?rater=${encodeURIComponent(name)}`, { signal: AbortSignal.timeout(TIMEOUT) });
  } catch {
    warn("The server does not answer. Trying again.");
    setTimeout(() => start(name), RETRY);
    return;
  }
  if (!reply.ok) {
    welcome();
    warn(await reply.text());
    return;
  }
  study = await reply.json();
  remember(study.rater);
  warn("");
  find("welcome").hidden = true;
  find("study").hidden = false;
  buildQuestions();
  const open = study.pairs.findIndex((each) => !complete(each));
  await go(open < 0 ? study.pairs.length : open, 0);
}

function welcome() {
  study = null;
  find("study").hidden = true;
  find("welcome").hidden = false;
  find("name").focus();
}

/** Kept in the address too, for browsers that keep nothing. */
function remember(name) {
  stored((storage) => (name ? storage.setItem(STORED, name) : storage.removeItem(STORED)));
  history.replaceState(null, "", name ? `?rater=${encodeURIComponent(name)}` : location.pathname);
}

function stored(use) {
  try {
    return use(localStorage);
  } catch {
    return null; // a browser that is told to keep nothing
  }
}

find("name-form").onsubmit = (event) => {
  event.preventDefault();
  start(find("name").value);
};
find("leave").onclick = async () => {
  await saver.flush();
  remember("");
  find("name").value = "";
  welcome();
};
find("back").onclick = () => go(place.pair - 1, 0);
find("next").onclick = () => go(afterwards(), 0);
addEventListener("beforeunload", (event) => saver.unsaved.size && event.preventDefault());

const known = new URLSearchParams(location.search).get("rater") || stored((storage) => storage.getItem(STORED));
if (known) start(known);
else welcome();
