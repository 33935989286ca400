// The explorer. Everything that comes from the service goes into the page as text, never as HTML.

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const TALLEST = 12e6;  // browsers draw no taller element
const CHOICES = 200;   // more labels than that are searched, not listed
const AT_ONCE = 100;   // examples that are described by one request
const NAMES = 5000;

const state = {
  about: null, train: null, test: null, token: sessionStorage.getItem("byline-token"),
  question: null, answer: null, selected: new Set(), away: false, asking: 0,
};

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") element.className = value;
    else if (name === "on") for (const [what, does] of Object.entries(value)) element.addEventListener(what, does);
    else if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

const grouped = (count) => String(count).replace(/\B(?=(\d{3})+$)/g, "\u202f");
const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);
const tell = (sentence) => { $("told").textContent = sentence; };

function figure(value, sign = true) {
  const text = Number(value.toPrecision(3)).toString();
  return (sign && value > 0 ? "+" : "") + text.replace("-", "\u2212");
}
const error = (value) => (Number.isFinite(value) ? "± " + Number(value.toPrecision(2)) : "");
const doubtful = (value, of) => Number.isFinite(of) && Math.abs(value) <= 2 * of;

// ---- asking the service

class Away extends Error {}
class Refusal extends Error {
  constructor(status, sentence) { super(sentence); this.status = status; }
}
const pause = (seconds) => new Promise((done) => setTimeout(done, 1000 * seconds));

async function ask(path, body, signal, left = 3) {
  const headers = { Accept: "application/json" };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (state.token) headers.Authorization = "Bearer " + state.token;
  let answer, data;
  try {
    const limit = AbortSignal.timeout(90000);
    answer = await fetch(path, {
      method: body === undefined ? "GET" : "POST", headers, body: body === undefined ? undefined : JSON.stringify(body),
      signal: signal ? AbortSignal.any([signal, limit]) : limit, cache: "no-store",
    });
    data = await answer.json();
  } catch (problem) {
    if (signal && signal.aborted) throw problem;
    if (!answer || answer.ok) { leave(); throw new Away(); }
    data = {};
  }
  if (answer.ok) return data;
  if (answer.status === 401) { askToken(state.token ? "That was not the token." : ""); throw new Refusal(401, "a token is needed"); }
  if ((answer.status === 429 || answer.status === 503) && left) {
    await pause(1);
    return ask(path, body, signal, left - 1);
  }
  if ([502, 503, 504].includes(answer.status)) { leave(); throw new Away(); }
  throw new Refusal(answer.status, typeof data.error === "string" ? data.error : `the service answered ${answer.status}`);
}

function unpack({ base64, dtype }) {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  return dtype === "float32" ? new Float32Array(bytes.buffer) : new Int32Array(bytes.buffer);
}

// ---- when the service goes away

function leave() {
  if (state.away) return;
  state.away = true;
  $("away").hidden = false;
  document.title = "(away) " + state.about?.title;
}

async function watch() {
  for (;;) {
    await pause(state.away ? 1 : 4);
    if (document.hidden && !state.away) continue;
    let well = false;
    try {
      well = (await fetch("/healthz", { signal: AbortSignal.timeout(4000), cache: "no-store" })).ok;
    } catch { /* it is away */ }
    if (!well) leave();
    else if (state.away) await comeBack();
  }
}

async function comeBack() {
  let about;
  try { about = await ask("/v1/explore"); } catch { return; }
  state.away = false;
  $("away").hidden = true;
  document.title = about.title;
  const before = state.about;
  if (!before || before.identity !== about.identity || before.n_test !== about.n_test) {
    tell("The service is back, with other data.");
    location.reload();
    return;
  }
  state.about = about;
  tell("The service is back.");
  for (const list of lists) list.draw();
  if (state.question && state.answer?.question !== state.question) explain(state.question, state.file);
  else change();
}

function askToken(note) {
  $("token").hidden = false;
  $("token-note").textContent = note;
  $("token-value").focus();
}

// ---- what examples look like, fetched as they come into view

class Looks {
  constructor(of) { this.of = of; this.known = new Map(); this.wanted = new Set(); this.coming = new Set(); this.timer = 0; }

  get(place) {
    const found = this.known.get(place);
    if (found === undefined && !this.coming.has(place)) {
      this.wanted.add(place);
      this.timer ||= setTimeout(() => this.fetch(), 40);
    }
    return found;
  }

  async fetch() {
    this.timer = 0;
    // the newest are those in view
    const places = [...this.wanted].slice(-AT_ONCE);
    this.wanted.clear();
    for (const place of places) this.coming.add(place);
    try {
      const found = await ask("/v1/explore/examples", { of: this.of, places });
      if (this.known.size > 20000) this.known.clear();
      for (const one of found.examples) this.known.set(one.index, one);
    } catch { /* drawn without; asked for again when they are drawn again */ }
    for (const place of places) this.coming.delete(place);
    if (places.every((place) => this.known.has(place))) for (const list of lists) if (list.looks === this) list.draw();
  }
}

function look(one, alt) {
  if (!one) return null;
  if (one.picture) return make("img", { src: one.picture, alt });
  if (one.text !== null) return make("pre", { tabindex: "0" }, one.text);
  if (one.cells.length) return make("dl", { class: "environment cells", tabindex: "0" }, ...pairs(one.cells));
  return null;
}
const pairs = (cells) => cells.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value)));

function glance(one) {
  return make("span", { class: "glance" }, one?.picture ? make("img", { src: one.picture, alt: "" }) : null);
}

/** What it is called, and the beginning of what it says where it is no picture. */
function what(head, one, ...more) {
  const words = one && !one.picture ? one.text ?? one.cells.map(([name, value]) => (/^\d+$/.test(name) ? value : `${name} ${value}`)).join(" · ") : "";
  const small = more.filter(Boolean);
  return make("span", { class: "what" }, make("strong", { title: head }, head), ...small.map((text) => make("small", { title: text }, text)),
    words && make("span", { class: "snippet" }, words));
}

/** A score on the scale of all of them: two standard errors to either side, a hollow dot where that reaches zero. */
function bar(value, of, reach) {
  const svg = document.createElementNS(SVG, "svg");
  const at = (x) => Math.max(1, Math.min(99, 50 + (47 * x) / (reach || 1)));
  const draw = (kind, path) => {
    const line = document.createElementNS(SVG, "path");
    line.setAttribute("class", kind);
    line.setAttribute("d", path);
    svg.append(line);
  };
  svg.setAttribute("class", "error");
  svg.setAttribute("viewBox", "0 0 100 12");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  draw("axis", "M0 6H100M50 1V11");
  if (Number.isFinite(of)) draw("whisker", `M${at(value - 2 * of)} 6H${at(value + 2 * of)}`);
  draw("dot", `M${at(value)} 6h0`);
  if (doubtful(value, of)) draw("hole", `M${at(value)} 6h0`);
  return svg;
}

// ---- a list of which only the rows in view are there

class WindowedList {
  constructor(root, { looks, fill, name, open, toggle, selected }) {
    Object.assign(this, { root, looks, fill, name, open, toggle, selected, places: [], active: 0, rows: new Map(), said: "" });
    this.span = make("div", { class: "span", "aria-hidden": "true" });
    this.holder = make("div", { class: "rows", role: "presentation" });
    root.append(this.holder, this.span);
    root.addEventListener("scroll", () => this.later(), { passive: true });
    root.addEventListener("keydown", (event) => this.key(event));
    root.addEventListener("focus", () => this.point());
    root.addEventListener("click", (event) => this.click(event));
    new ResizeObserver(() => this.later()).observe(root);
  }

  set(places, empty) {
    this.places = places;
    this.active = Math.min(this.active, Math.max(0, places.length - 1));
    this.empty = empty;
    this.clear();
    this.draw();
  }

  clear() { for (const row of this.rows.values()) row.remove(); this.rows.clear(); }
  later() { this.frame ||= requestAnimationFrame(() => { this.frame = 0; this.draw(); }); }

  /** Pixels of a row, which the style says in rem. */
  get tall() {
    const rem = parseFloat(getComputedStyle(document.documentElement).fontSize);
    return parseFloat(getComputedStyle(this.root).getPropertyValue("--row")) * rem || 72;
  }

  /** Pixels of a row's top for a scroll position: the same, unless the whole would be taller than a browser draws. */
  measure() {
    const tall = this.tall, all = tall * this.places.length, inside = this.root.clientHeight;
    const drawn = Math.min(all, TALLEST);
    const ratio = drawn > inside ? (all - inside) / (drawn - inside) : 1;
    return { tall, all, inside, drawn, ratio };
  }

  draw() {
    if (!this.root.clientHeight) return;
    const { tall, inside, drawn, ratio } = this.measure();
    this.span.style.height = drawn + "px";
    const top = this.root.scrollTop * ratio;
    const first = Math.max(0, Math.floor(top / tall) - 2);
    const last = Math.min(this.places.length, Math.ceil((top + inside) / tall) + 2);
    for (const [position, row] of this.rows) if (position < first || position >= last) { row.remove(); this.rows.delete(position); }
    for (let position = first; position < last; position++) this.row(position, position * tall - top, tall);
    this.note?.remove();
    this.note = null;
    if (!this.places.length) this.holder.append(this.note = make("p", { class: "empty" }, this.empty ?? ""));
    this.point();
  }

  row(position, y, tall) {
    const place = this.places[position], known = this.looks.get(place);
    let row = this.rows.get(position);
    if (!row) {
      row = make("div", { class: "row", role: "option", id: `${this.root.id}-${position}`, "aria-setsize": this.places.length, "aria-posinset": position + 1 });
      row.style.height = tall + "px";
      this.rows.set(position, row);
      this.holder.append(row);
    }
    if (row.known !== known || !row.childElementCount) {
      row.known = known;
      row.replaceChildren();
      this.fill(row, place, known);
      row.setAttribute("aria-label", this.name(place, known));
    }
    row.style.transform = `translateY(${y}px)`;
    row.setAttribute("aria-selected", String(this.selected(place)));
    row.classList.toggle("active", position === this.active);
  }

  point() {
    for (const [position, row] of this.rows) row.classList.toggle("active", position === this.active);
    const id = `${this.root.id}-${this.active}`;
    if (this.rows.has(this.active)) this.root.setAttribute("aria-activedescendant", id);
    else this.root.removeAttribute("aria-activedescendant");
  }

  go(position) {
    if (!this.places.length) return;
    this.active = Math.max(0, Math.min(this.places.length - 1, position));
    const { tall, inside, ratio } = this.measure();
    const top = this.root.scrollTop * ratio, y = this.active * tall;
    if (y < top) this.root.scrollTop = y / ratio;
    else if (y + tall > top + inside) this.root.scrollTop = (y + tall - inside) / ratio;
    this.draw();
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target !== this.root) return;
    const page = Math.max(1, Math.floor(this.root.clientHeight / this.tall) - 1), place = this.places[this.active];
    const moves = { ArrowDown: this.active + 1, ArrowUp: this.active - 1, PageDown: this.active + page,
      PageUp: this.active - page, Home: 0, End: this.places.length - 1 };
    if (event.key in moves) this.go(moves[event.key]);
    else if (place === undefined) return;
    else if (event.key === " ") this.toggle(place);
    else if (event.key === "Enter") this.open(place);
    else return;
    event.preventDefault();
  }

  click(event) {
    const row = event.target.closest(".row");
    if (!row) return;
    this.active = Number(row.id.slice(this.root.id.length + 1));
    const place = this.places[this.active];
    if (event.target.closest(".box")) this.toggle(place);
    else this.open(place);
    this.draw();
  }
}

// ---- examples in words

const kind = () => (state.about.own ? "training example" : "test example");
const labelOf = (columns, place) => (columns.labels ? columns.labels.values[columns.labels.codes[place]] : null);
const ownerOf = (place) => (state.train.owners ? state.train.owners.values[state.train.owners.codes[place]] : null);

function titled(place, one, columns) {
  const label = labelOf(columns, place), called = one?.name ?? `no. ${place}`;
  return { head: label || called, small: label ? called : "" };
}

function trainName(place, one) {
  const { scores, stderr } = state.answer, value = scores[place];
  const parts = [`training example ${place}`, one?.name, labelOf(state.train, place) && `label ${labelOf(state.train, place)}`,
    ownerOf(place) && `owner ${ownerOf(place)}`, `score ${figure(value)} ${error(stderr[place])}`,
    doubtful(value, stderr[place]) && "not told from zero"];
  return parts.filter(Boolean).join(", ");
}

function fillTrain(row, place, one) {
  const { scores, stderr, reach } = state.answer, value = scores[place], of = stderr[place];
  const { head, small } = titled(place, one, state.train);
  const owner = ownerOf(place);
  row.classList.toggle("unsure", doubtful(value, of));
  row.append(
    make("span", { class: "box" }), glance(one),
    what(head, one, [small, owner].filter(Boolean).join(" · ")),
    bar(value, of, reach),
    make("span", { class: "number" }, figure(value), make("small", {}, doubtful(value, of) ? "perhaps 0" : error(of))),
  );
}

function fillTest(row, place, one) {
  const { head, small } = titled(place, one, state.test), said = one?.predicted;
  row.append(glance(one), what(head, one, small, said && said !== head && `model says ${said}`));
}

let tests, up, down, lists = [], trainLooks, testLooks;

function makeLists() {
  trainLooks = new Looks("train");
  testLooks = state.about.own ? trainLooks : new Looks("test");
  tests = new WindowedList($("tests"), {
    looks: testLooks, fill: fillTest, open: (place) => explain({ test: place }), toggle: (place) => explain({ test: place }),
    name: (place, one) => [`${kind()} ${place}`, one?.name, labelOf(state.test, place) && `label ${labelOf(state.test, place)}`, one?.predicted && `model says ${one.predicted}`].filter(Boolean).join(", "),
    selected: (place) => state.question?.test === place,
  });
  const side = { looks: trainLooks, fill: fillTrain, name: trainName, open: follow, toggle: select, selected: (place) => state.selected.has(place) };
  up = new WindowedList($("up"), side);
  down = new WindowedList($("down"), side);
  lists = [tests, up, down];
}

/** Pictures stand beside words; texts and rows take more room; with neither there is none to keep. */
function shape(list, one) {
  list.root.classList.toggle("lines", Boolean(one && !one.picture && (one.text !== null || one.cells.length)));
  list.root.classList.toggle("bare", Boolean(one && !one.picture && one.text === null && !one.cells.length));
}

// ---- asking about an example

let asked = null;

async function explain(question, file = null) {
  asked?.abort();
  const mine = (asked = new AbortController());
  state.question = question;
  state.file = file;
  $("refusal").textContent = "";
  $("question").setAttribute("aria-busy", "true");
  tests.draw();
  const place = question.test;
  if (place !== undefined) history.replaceState(null, "", `#${place}`);
  else history.replaceState(null, "", location.pathname);
  try {
    const found = await ask("/v1/explore/scores", question, mine.signal);
    const scores = unpack(found.scores), stderr = unpack(found.stderr);
    let reach = 0;
    for (let i = 0; i < scores.length; i++) reach = Math.max(reach, Math.abs(scores[i]) + (Number.isFinite(stderr[i]) ? 2 * stderr[i] : 0));
    const order = Uint32Array.from(scores.keys()).sort((a, b) => scores[b] - scores[a] || a - b);
    state.answer = { ...found, question, scores, stderr, reach, order };
    showQuestion();
    filter();
    change();
    const best = state.answer.order[0];
    tell(`${$("h-question").textContent}. ${$("count-up").textContent}. Strongest: ${trainName(best, trainLooks.known.get(best))}.`);
  } catch (problem) {
    if (mine.signal.aborted || problem instanceof Away) return;
    refuse(question.test === undefined ? "upload-refusal" : "refusal", sentence(problem));
    state.question = state.answer?.question ?? null;
    tests.draw();
  } finally {
    if (asked === mine) $("question").setAttribute("aria-busy", "false");
  }
}

function refuse(where, words) {
  $(where).textContent = words;
  $(where).scrollIntoView({ block: "nearest" });
}

function sentence(problem) {
  const text = problem instanceof Refusal ? problem.message : "This page failed: " + problem.message;
  return capital(text) + (/[.!?]$/.test(text) ? "" : ".");
}

function showQuestion() {
  const { answer, about } = state, place = answer.question.test;
  const name = place === undefined ? state.file || "Your example" : answer.shown.name || capital(`${kind()} ${place}`);
  $("h-question").textContent = name;
  $("question-look").replaceChildren(...[look(answer.shown, `${name}${answer.shown.label ? ", label " + answer.shown.label : ""}`)].filter(Boolean));
  const words = [];
  if (answer.shown.label) words.push("label ", make("strong", {}, answer.shown.label), " · ");
  if (answer.predicted !== null) words.push("the model says ", make("strong", {}, answer.predicted), " · ");
  words.push(about.classified ? "log-odds of " : `${about.output} `);
  if (about.classified) words.push(make("bdi", {}, answer.label_name ?? "its label"), " ");
  words.push(make("strong", {}, figure(answer.output)), about.classified ? ` (${Math.round(100 / (1 + Math.exp(-answer.output)))} %)` : "", about.members > 1 ? ` in the mean of ${about.members} members` : " from one member: no error bars");
  $("question-words").replaceChildren(...words);
  $("explained-field").hidden = !about.classified || about.classes.length < 2;
  if (answer.label !== null) $("explained").value = String(answer.label);
}

// ---- filters

function choice(select, text, field, column) {
  field.hidden = !column;
  if (!column) return;
  const few = column.values.length <= CHOICES;
  select.hidden = !few;
  text.hidden = few;
  if (few) select.replaceChildren(make("option", { value: "" }, "all"), ...column.values.map((value, place) => make("option", { value: place }, value || "(none)")));
}

/** Which codes of a column pass: null for all of them. */
function passing(select, text, column) {
  if (!column) return null;
  if (!select.hidden) return select.value === "" ? null : Uint8Array.from(column.values, (_, place) => Number(String(place) === select.value));
  const wanted = text.value.trim().toLocaleLowerCase();
  return wanted ? Uint8Array.from(column.values, (value) => Number(value.toLocaleLowerCase().includes(wanted))) : null;
}

function filter() {
  const { answer, train } = state;
  if (!answer) return;
  const { scores, stderr, order } = answer, n = order.length;
  const labels = passing($("label"), $("label-text"), train.labels), owners = passing($("owner"), $("owner-text"), train.owners);
  const sure = $("sure").checked, sign = $("sign").value;
  $("reset").hidden = !labels && !owners && !sure && sign === "both";
  const keep = (place) => (!labels || labels[train.labels.codes[place]]) && (!owners || owners[train.owners.codes[place]]) && (!sure || Math.abs(scores[place]) > 2 * stderr[place]);
  const higher = [], lower = [];
  let positive = 0, negative = 0;
  for (let i = 0; i < n && scores[order[i]] > 0; i++, positive++) if (keep(order[i])) higher.push(order[i]);
  for (let i = n - 1; i >= 0 && scores[order[i]] < 0; i--, negative++) if (keep(order[i])) lower.push(order[i]);
  $("found").hidden = false;
  $("chosen").hidden = false;
  $("side-up").hidden = sign === "down";
  $("side-down").hidden = sign === "up";
  $("sides").classList.toggle("alone", sign !== "both");
  $("count-up").textContent = counted(higher.length, positive, "proponents");
  $("count-down").textContent = counted(lower.length, negative, "opponents");
  up.set(higher, positive ? "None passes the filter." : "No score of this sign.");
  down.set(lower, negative ? "None passes the filter." : "No score of this sign.");
}

function counted(some, all, what) {
  return some === all ? `${grouped(all)} ${what}` : `${grouped(some)} of ${grouped(all)} ${what}`;
}

function filtered() {
  up.root.scrollTop = down.root.scrollTop = up.active = down.active = 0;
  filter();
  tell([$("side-up").hidden ? "" : $("count-up").textContent, $("side-down").hidden ? "" : $("count-down").textContent].filter(Boolean).join(", "));
}

function filterTests() {
  const column = state.test.labels, wanted = $("test-label").value, said = state.test.predicted;
  const places = [];
  for (let place = 0; place < state.about.n_test; place++) {
    if (column && wanted !== "" && String(column.codes[place]) !== wanted) continue;
    if (said && $("wrong").checked && said.values[said.codes[place]] === column.values[column.codes[place]]) continue;
    places.push(place);
  }
  tests.set(places, "None passes the filter.");
}

// ---- selecting, and what would change

function select(place) {
  if (!state.selected.delete(place)) state.selected.add(place);
  selectionChanged();
}

function selectionChanged() {
  up.draw();
  down.draw();
  change();
}

let changing = null, timer = 0;

function change() {
  const count = state.selected.size;
  $("chosen-count").textContent = count ? `${grouped(count)} selected` : "Nothing selected";
  for (const id of ["clear", "csv", "json"]) $(id).hidden = !count;
  $("chosen").classList.toggle("some", count > 0);
  changing?.abort();
  clearTimeout(timer);
  if (!count || !state.answer) {
    $("chosen-change").textContent = "Select training examples to see what the model would say without them.";
    return;
  }
  $("chosen-change").textContent = state.away ? "What the model would say without them is told when the service is back." : "Asking…";
  timer = setTimeout(askChange, 150);
}

async function askChange() {
  const mine = (changing = new AbortController());
  try {
    const found = await ask("/v1/explore/change", { question: state.answer.question, removed: [...state.selected] }, mine.signal);
    const { unit } = state.about, by = make("strong", {}, figure(found.change));
    const how = found.stderr === null ? " (one member: no error)" : ` ${error(found.stderr)}${found.bound ? " at most" : ""}`;
    const now = figure(found.output), then = figure(found.output + found.change);
    const before = unit === null ? "Without them the output would change by "
      : now === then ? `Without them the output of ${now} would change by ` : `Without them: output ${now} \u2192 ${then}, a change of `;
    const after = (found.stderr !== null && doubtful(found.change, found.stderr) ? ", not told from zero" : "") + (unit === null ? ", in units of the scores, which know no scale" : "") + ". To first order.";
    $("chosen-change").replaceChildren(before, by, how, after);
    state.change = found;
  } catch (problem) {
    if (!mine.signal.aborted && !(problem instanceof Away)) $("chosen-change").textContent = sentence(problem);
  }
}

function selectListed() {
  for (const [list, side] of [[up, "side-up"], [down, "side-down"]]) if (!$(side).hidden) for (const place of list.places) state.selected.add(place);
  selectionChanged();
}

// ---- following a training example

let following = null;

async function follow(place) {
  following?.abort();
  const mine = (following = new AbortController()), dialog = $("one");
  const known = trainLooks.known.get(place), { answer } = state;
  dialog.place = place;
  $("h-one").textContent = known?.name || `Training example ${place}`;
  $("one-look").replaceChildren(...[look(known, "")].filter(Boolean));
  const facts = [["training example", known?.name && `no. ${place}`], ["label", labelOf(state.train, place)], ["owner", ownerOf(place)],
    ["score", `${figure(answer.scores[place])} ${error(answer.stderr[place])}${doubtful(answer.scores[place], answer.stderr[place]) ? ", not told from zero" : ""}`]].filter(([, value]) => value);
  $("one-facts").replaceChildren(...pairs(facts));
  $("moved").replaceChildren(make("p", { class: "note" }, "Asking… The first time takes a moment: the known examples go through every member."));
  pressed();
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
  try {
    const [whole, found] = await Promise.all([
      ask("/v1/explore/examples", { of: "train", places: [place], whole: true }, mine.signal),
      ask(`/v1/explore/influence/${place}`, undefined, mine.signal),
    ]);
    const one = whole.examples[0], scores = unpack(found.scores), stderr = unpack(found.stderr);
    $("h-one").textContent = one.name || `Training example ${place}`;
    $("one-look").replaceChildren(...[look(one, `training example ${place}`)].filter(Boolean));
    const shown = new Set([labelOf(state.train, place), ownerOf(place), one.name]);
    $("one-facts").replaceChildren(...pairs([...facts, ...one.metadata.filter(([, value]) => !shown.has(value))]));
    await moved(scores, stderr, mine.signal);
  } catch (problem) {
    if (mine.signal.aborted) return;
    $("moved").replaceChildren(make("p", { class: "refusal" }, problem instanceof Away ? "The service does not answer; open this again when it is back." : sentence(problem)));
  }
}

async function moved(scores, stderr, signal) {
  const order = [...scores.keys()].sort((a, b) => scores[b] - scores[a] || a - b), most = 8;
  const higher = order.slice(0, most).filter((place) => scores[place] > 0), lower = order.reverse().slice(0, most).filter((place) => scores[place] < 0);
  const places = [...higher, ...lower];
  const found = places.length ? (await ask("/v1/explore/examples", { of: state.about.own ? "train" : "test", places }, signal)).examples : [];
  const looks = new Map(found.map((one) => [one.index, one]));
  const reach = Math.max(...places.map((place) => Math.abs(scores[place]) + (Number.isFinite(stderr[place]) ? 2 * stderr[place] : 0)));
  $("moved-of").textContent = `of ${scores.length < state.about.n_test ? "the first " : ""}${grouped(scores.length)} ${kind()}s`;
  const lines = found.some((one) => !one.picture && (one.text !== null || one.cells.length)) ? " lines" : "";
  const side = (css, title, list) => make("div", { class: `moved ${css}${lines}` }, make("h4", {}, title), list.length ? make("ul", {}, ...list.map((place) => {
    const one = looks.get(place), { head, small } = titled(place, one, state.test), unsure = doubtful(scores[place], stderr[place]);
    const button = make("button", { type: "button", "aria-label": `${kind()} ${place}, ${head}, score ${figure(scores[place])} ${error(stderr[place])}${unsure ? ", not told from zero" : ""}: explain it`,
      on: { click: () => { $("one").close(); explain({ test: place }); $("answer").focus(); $("answer").scrollIntoView(); } } },
      glance(one), what(head, one, small), bar(scores[place], stderr[place], reach),
      make("span", { class: "number" }, figure(scores[place]), make("small", {}, unsure ? "perhaps 0" : error(stderr[place]))));
    return make("li", { class: unsure ? "unsure" : "" }, button);
  })) : make("p", { class: "note" }, "None."));
  $("moved").replaceChildren(side("up", "Pushes up", higher), side("down", "Pushes down", lower));
}

function pressed() {
  const on = state.selected.has($("one").place);
  $("one-select").setAttribute("aria-pressed", String(on));
  $("one-select").textContent = on ? "Selected: take back" : "Select";
}

// ---- taking the selection home

async function chosenRows() {
  const places = [...state.selected].sort((a, b) => state.answer.scores[b] - state.answer.scores[a] || a - b), names = [];
  for (let start = 0; start < places.length; start += NAMES) names.push(...(await ask("/v1/explore/names", { places: places.slice(start, start + NAMES) })).names);
  const { scores, stderr } = state.answer, finite = (value) => (Number.isFinite(value) ? value : null);
  return places.map((place, at) => ({ index: place, name: names[at], label: labelOf(state.train, place), owner: ownerOf(place), score: scores[place], stderr: finite(stderr[place]), told_from_zero: Number.isFinite(stderr[place]) ? !doubtful(scores[place], stderr[place]) : null }));
}

async function save(type) {
  try {
    const rows = await chosenRows();
    const text = type === "csv" ? csv(rows) : JSON.stringify({
      title: state.about.title, method: state.about.method, members: state.about.members, question: state.answer.question,
      explained: state.answer.label_name, output: state.answer.output, predicted_change: state.change?.change ?? null, predicted_change_stderr: state.change?.stderr ?? null, selected: rows,
    }, null, 1);
    const link = make("a", { href: URL.createObjectURL(new Blob([text], { type: type === "csv" ? "text/csv" : "application/json" })), download: `selected.${type}` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    tell(`${rows.length} rows saved as selected.${type}.`);
  } catch (problem) {
    if (!(problem instanceof Away)) $("chosen-change").textContent = sentence(problem);
  }
}

function csv(rows) {
  const cell = (value) => {
    if (value === null || value === undefined) return "";
    if (typeof value !== "string") return String(value);
    // a spreadsheet must not take a name for a formula
    const text = /^[=+\-@\t\r]/.test(value) ? "'" + value : value;
    return /[",\r\n']/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const names = Object.keys(rows[0]);
  return [names.join(","), ...rows.map((row) => names.map((name) => cell(row[name])).join(","))].join("\r\n") + "\r\n";
}

// ---- an example of one's own

const TAKES = {
  image: { accept: "image/*", label: "A picture", hint: "PNG, JPEG, WebP, GIF or BMP; it is brought to the model's size.", kind: /^image\// },
  row: { accept: ".csv,text/csv", label: "A CSV file of one row", text: "or the row itself, with a header line where columns have names", hint: "" },
  text: { accept: ".txt,text/plain", label: "A text file", text: "or the text itself", hint: "" },
  file: { accept: "", label: "A file", hint: "" },
};

function offer() {
  const takes = TAKES[state.about.takes];
  $("upload-file-field").hidden = !takes;
  $("upload-text-field").hidden = !takes?.text;
  if (takes) {
    $("upload-file").accept = takes.accept;
    $("upload-file-label").textContent = takes.label;
    $("upload-hint").textContent = `${takes.hint} At most ${megabytes(most())}.`.trim();
    $("upload-text-label").textContent = takes.text ?? "";
  }
  $("upload-form").textContent = "The form of an example: " + (typeof state.about.form === "string" ? state.about.form : JSON.stringify(state.about.form));
}

const most = () => Math.floor(0.74 * state.about.largest);
const megabytes = (bytes) => (bytes < 1e6 ? `${Math.ceil(bytes / 1e3)} kB` : `${(bytes / 1e6).toFixed(1)} MB`);

async function bring(event) {
  event.preventDefault();
  const file = $("upload-file").files[0], typed = $("upload-text").value, json = $("upload-json").value.trim();
  $("upload-refusal").textContent = "";
  if (file) {
    const takes = TAKES[state.about.takes];
    if (takes.kind && !takes.kind.test(file.type)) return refuse("upload-refusal", `${file.name} is ${file.type || "of an unknown kind"}; expected a picture.`);
    if (file.size > most()) return refuse("upload-refusal", `${file.name} has ${megabytes(file.size)}; at most ${megabytes(most())} can be sent.`);
    await explain({ upload: { base64: encoded(new Uint8Array(await file.arrayBuffer())) } }, file.name);
  } else if (typed.trim()) await explain({ upload: { base64: encoded(new TextEncoder().encode(typed)) } }, "Your example");
  else if (json) {
    let example;
    try { example = JSON.parse(json); } catch (problem) { return refuse("upload-refusal", `That is no JSON: ${problem.message}.`); }
    await explain({ example }, "Your example");
  } else return refuse("upload-refusal", "Choose a file, or write an example.");
  if (!$("upload-refusal").textContent && !state.away) $("answer").focus();
}

function encoded(bytes) {
  let text = "";
  for (let start = 0; start < bytes.length; start += 32768) text += String.fromCharCode(...bytes.subarray(start, start + 32768));
  return btoa(text);
}

// ---- the beginning

function ready(column) {
  return column && { values: column.values, codes: unpack(column.codes) };
}

async function begin() {
  try {
    const [about, columns] = [await ask("/v1/explore"), await ask("/v1/explore/columns")];
    state.about = about;
    for (const of of ["train", "test"]) state[of] = Object.fromEntries(Object.entries(columns[of]).map(([name, column]) => [name, ready(column)]));
  } catch (problem) {
    if (problem instanceof Refusal && problem.status !== 401) $("title").textContent = sentence(problem);
    return;
  }
  const { about } = state;
  document.title = $("title").textContent = about.title;
  const facts = [["training examples", grouped(about.n_train)], [about.own ? "of them to explain" : "test examples", grouped(about.n_test)], ["method", about.method], ["members", String(about.members)]];
  $("facts").replaceChildren(...facts.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
  $("panes").hidden = false;
  $("token").hidden = true;
  makeLists();
  choice($("label"), $("label-text"), $("label-field"), state.train.labels);
  choice($("owner"), $("owner-text"), $("owner-field"), state.train.owners);
  $("sure-field").hidden = about.members < 2;
  const few = state.test.labels && state.test.labels.values.length <= CHOICES;
  if (few) choice($("test-label"), $("test-label"), $("test-label-field"), state.test.labels);
  $("test-label").hidden = false;
  $("wrong-field").hidden = !(few && state.test.predicted);
  $("test-tools").hidden = !few;
  $("explained").replaceChildren(...about.classes.map((name, place) => make("option", { value: place }, name)));
  offer();
  filterTests();
  for (const [of, list] of [["train", [up, down]], ["test", [tests]]]) {
    try {
      const first = (await ask("/v1/explore/examples", { of: about.own ? "train" : of, places: [0] })).examples[0];
      for (const each of list) shape(each, first);
    } catch { /* drawn as pictures */ }
  }
  for (const each of lists) { each.clear(); each.draw(); }
  const linked = /^#\d+$/.test(location.hash) ? Number(location.hash.slice(1)) : 0;
  const start = linked < about.n_test ? linked : 0;
  tests.go(start);
  explain({ test: start });
}

for (const id of ["label", "owner", "sign", "sure"]) $(id).addEventListener("change", filtered);
for (const id of ["label-text", "owner-text"]) $(id).addEventListener("input", filtered);
$("test-label").addEventListener("change", filterTests);
$("wrong").addEventListener("change", filterTests);
$("reset").addEventListener("click", () => {
  for (const id of ["label", "owner", "label-text", "owner-text"]) $(id).value = "";
  $("sign").value = "both";
  $("sure").checked = false;
  filtered();
});
$("explained").addEventListener("change", () => explain({ ...state.question, label: Number($("explained").value) }, state.file));
$("upload").addEventListener("submit", bring);
$("select-all").addEventListener("click", selectListed);
$("clear").addEventListener("click", () => { state.selected.clear(); selectionChanged(); });
$("csv").addEventListener("click", () => save("csv"));
$("json").addEventListener("click", () => save("json"));
$("one-close").addEventListener("click", () => $("one").close());
$("one-select").addEventListener("click", () => { select($("one").place); pressed(); });
// told late, it may be open again for another example
$("one").addEventListener("close", () => { if (!$("one").open) following?.abort(); });
$("one").addEventListener("click", (event) => { if (event.target === $("one")) $("one").close(); });
$("token").addEventListener("submit", (event) => {
  event.preventDefault();
  state.token = $("token-value").value;
  sessionStorage.setItem("byline-token", state.token);
  begin();
});

begin().then(watch);
