// The page: reads the events, and fills tiles, charts and the table.

const find = (id) => document.getElementById(id);
const place = find("charts");
const charts = {
  goodput: new Chart(place, { name: "Goodput", about: "Tokens per second of step time: what plans expected, and what came." }),
  tokens: new Chart(place, { name: "Tokens per step", about: "Of a row that emits; 1 is plain decoding." }),
  shares: new Chart(place, { name: "Bets", about: "Shares of rows by method; the deeper, the darker." }),
  requests: new Chart(place, { name: "Load", about: "Requests that run, and those that wait." }),
  kv: new Chart(place, { name: "KV cache", about: "Share of the pages that requests hold." }),
  cost: new Chart(place, { name: "Cost of a pass", about: "Milliseconds by new tokens, guesses included." }),
  acceptance: new Chart(place, { name: "Acceptance by position", about: "Share of the drafts that got so far whose next guess was right." }),
  calibration: new Chart(place, { name: "Calibration", about: "Predicted against accepted; on the diagonal is honest." }),
  choices: new Chart(place, { name: "Other choices", about: "Milliseconds per token in the last minute, others estimated." }),
};
let points = new Map(); // second -> point
let paused = false, wait = 1;

/** The last minutes, second by second. Seconds without a point are idle, unless the next step took them. */
function timeline(now) {
  const first = Math.max(Math.min(...points.keys()), Math.floor(now) - SPAN), found = [];
  const idle = { goodput: null, foreseen: null, expected: null, tokens_per_second: 0, tokens_per_step: null, shares: {}, running: 0, waiting: 0, kv: 0 };
  for (let at = first; points.size && at < Math.floor(now); at += 1) found.push(points.get(at) ?? { ...idle, at });
  found.forEach((point, place) => {
    const { running, waiting, kv } = point;
    for (let before = 1; before < point.busy && found[place - before] && !points.has(found[place - before].at); before += 1)
      Object.assign(found[place - before], { running, waiting, kv });
  });
  return found;
}

function tile(name, value, more) {
  return element("div", {}, element("dt", {}, name), element("dd", {}, value, " ", element("small", {}, more ?? "")));
}

function show(snapshot) {
  for (const at of points.keys()) if (at < snapshot.now - SPAN - 1 || at > snapshot.now) points.delete(at);
  for (const point of snapshot.points) points.set(point.at, point);
  if (paused) return;
  const line = timeline(snapshot.now), recent = line.slice(-10);
  const tokens = recent.reduce((sum, p) => sum + p.tokens_per_second, 0) / Math.max(recent.length, 1);
  find("model").textContent = snapshot.model;
  document.title = `${short(tokens)} tok/s – Parlay`;
  state(`policy ${snapshot.policy}${snapshot.paused ? ", bets pause because they did not pay" : ""}`);
  const { choices: compared } = snapshot;
  find("tiles").replaceChildren(
    tile("Tokens per second", short(tokens), "last 10 s"),
    tile("Tokens per step", short(line.at(-1)?.tokens_per_step), "a row"),
    tile("Running", snapshot.running, `of ${snapshot.slots} places`),
    tile("Waiting", snapshot.waiting, `${snapshot.preemptions} preempted so far`),
    tile("KV cache", percent(snapshot.kv)),
    tile("Time against no bets", compared ? signed(compared.regret_to_off) : "–", "last minute, estimated"),
    tile("Regret to best fixed bet", compared ? signed(compared.regret_to_best) : "–", "last minute, estimated"),
    ...(snapshot.failed_drafters.length ? [tile("Switched off", snapshot.failed_drafters.join(", "), "after an error")] : []),
  );
  charts.goodput.show(overTime(line, [
    { name: "realised", color: "var(--c1)", of: (p) => p.foreseen ?? p.goodput ?? null },
    { name: "expected", color: "var(--c2)", dash: "dashed", of: (p) => p.expected ?? null },
  ], short));
  charts.tokens.show(overTime(line, [{ name: "tokens", color: "var(--c3)", of: (p) => p.tokens_per_step }], short));
  charts.shares.show(shares(line));
  charts.requests.show(overTime(line, [
    { name: "running", color: "var(--c1)", of: (p) => p.running },
    { name: "waiting", color: "var(--c2)", dash: "dashed", of: (p) => p.waiting },
  ], plainly));
  charts.kv.show(overTime(line, [{ name: "used", color: "var(--c4)", of: (p) => p.kv }], percent, 1));
  charts.cost.show(cost(snapshot));
  charts.acceptance.show(acceptance(snapshot));
  charts.calibration.show(calibration(snapshot));
  charts.choices.show(choices(snapshot));
  table(snapshot.requests);
}

function table(requests) {
  const rows = find("rows");
  find("none").hidden = requests.length > 0;
  while (rows.childElementCount > requests.length) rows.lastElementChild.remove();
  while (rows.childElementCount < requests.length) {
    const cells = [...Array(7)].map((_, at) => element("td", { class: at > 0 && at < 4 ? "number" : "" }));
    rows.append(element("tr", {}, element("th", { scope: "row" }), ...cells));
  }
  requests.forEach((request, at) => {
    const [id, state, prompt, output, perStep, asked, bet, tree] = rows.children[at].children;
    id.textContent = request.choice ? `${request.id} #${request.choice}` : request.id;
    id.title = request.id;
    state.textContent = !request.runs ? "waits" : request.output ? "decodes" : `reads ${request.known} of ${request.prompt}`;
    prompt.textContent = request.prompt;
    output.textContent = request.output;
    perStep.textContent = request.steps ? short(request.output / request.steps) : "–";
    asked.textContent = request.wish;
    bet.textContent = request.guesses ? `${request.method}, ${request.guesses} guesses` : "none";
    tree.replaceChildren(...(request.tree.length ? [drawn(request)] : []));
  });
}

/** A tree from its parents: levels from left to right, children below each other. */
function drawn({ tree, depth, guesses, accepted }) {
  const depths = [], ys = [], children = new Map();
  tree.forEach((parent, node) => {
    depths[node] = parent < 0 ? 1 : depths[parent] + 1;
    children.set(parent, [...(children.get(parent) ?? []), node]);
  });
  let leaves = 0;
  const settle = (node) => {
    const mine = children.get(node);
    if (!mine) return (ys[node] = leaves++);
    mine.forEach(settle);
    const middle = (ys[mine[0]] + ys[mine.at(-1)]) / 2;
    return node < 0 ? (ys.root = middle) : (ys[node] = middle);
  };
  settle(-1);
  const step = 14, high = 34, gap = Math.min(10, (high - 8) / Math.max(leaves - 1, 1));
  const x = (level) => 6 + level * step, y = (value) => high / 2 + (value - (leaves - 1) / 2) * gap;
  const won = new Set(accepted), picture = shape("svg", {
    viewBox: `0 0 ${x(Math.max(...depths)) + 6} ${high}`, role: "img",
    "aria-label": `${guesses} guesses, ${depth} deep, ${accepted.length} accepted`,
  });
  tree.forEach((parent, node) => picture.append(shape("line", { class: "edge", x1: x(parent < 0 ? 0 : depths[parent]), y1: y(parent < 0 ? ys.root : ys[parent]), x2: x(depths[node]), y2: y(ys[node]) })));
  tree.forEach((_, node) => picture.append(shape("circle", { class: won.has(node) ? "node won" : "node", cx: x(depths[node]), cy: y(ys[node]), r: Math.min(3.5, gap / 2 + 1) })));
  picture.append(shape("rect", { class: "root", x: 3, y: y(ys.root) - 3, width: 6, height: 6 }));
  return picture;
}

function state(text) {
  const said = paused ? `paused; ${text}` : text;
  if (find("state").textContent !== said) find("state").textContent = said;
}

/** Reads server-sent events until they end; a plain EventSource could not show a key. */
async function listen(signal) {
  const key = sessionStorage.getItem("parlay-key");
  const url = `${location.pathname.replace(/\/$/, "")}/events`;
  const answer = await fetch(url, { headers: key ? { Authorization: `Bearer ${key}` } : {}, cache: "no-store", signal });
  if (answer.status === 401) return ask(key !== null);
  if (!answer.ok) throw new Error((await answer.json()).error.message);
  find("key").hidden = true;
  points = new Map();
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let held = ""; ; ) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the connection is lost");
    held += value;
    for (let end = held.indexOf("\n\n"); end >= 0; end = held.indexOf("\n\n")) {
      take(held.slice(0, end));
      held = held.slice(end + 2);
      wait = 1;
    }
  }
}

function take(event) {
  const data = JSON.parse(event.slice(event.indexOf("data: ") + 6));
  if (event.startsWith("event: failed")) throw new Error(data.reason);
  show(data);
}

function ask(refused) {
  find("key").hidden = false;
  find("refused").textContent = refused ? "the key is wrong" : "";
  state("waiting for the key");
  find("secret").focus();
}

let listening = new AbortController(), later;

/** Listens until it fails, and then again; whoever listened before is told to stop. */
async function run() {
  listening.abort();
  clearTimeout(later);
  const mine = (listening = new AbortController());
  try {
    await listen(mine.signal);
  } catch (error) {
    if (mine !== listening) return;
    mine.abort();
    state(`${error.message}; trying again in ${wait} s`);
    later = setTimeout(run, 1000 * wait);
    wait = Math.min(2 * wait, 30);
  }
}

find("pause").addEventListener("click", () => {
  paused = !paused;
  find("pause").setAttribute("aria-pressed", paused);
  find("pause").textContent = paused ? "Go on" : "Pause";
  if (paused) state(find("state").textContent);
});
find("key").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("parlay-key", find("secret").value);
  run();
});
run();
