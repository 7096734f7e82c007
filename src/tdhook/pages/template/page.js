// The page: which step, output and environment is shown, and what changes that.
const WINDOW = 160; // steps around the present one that are drawn larger
const state = { view: 0, environment: 0, step: 0 };
const overview = new Strip(element("overview"), (step) => goTo(step));
const detail = new Strip(element("detail"), (step) => goTo(step));
let playing = null;

const at = (step) => state.environment * data.time + step;

function goTo(step) {
  state.step = Math.max(0, Math.min(data.time - 1, step));
  showStep();
}

function showStep() {
  const { step, environment } = state;
  const view = data.views[state.view];
  const index = at(step);
  const slider = element("step");
  slider.value = step;
  const last = data.episode[at(data.time - 1)] + 1;
  const episode = `episode ${data.episode[index] + 1} of ${last}`;
  element("where").textContent = `step ${step} of ${data.time} · ${episode}`;
  slider.setAttribute("aria-valuetext", `step ${step}, ${episode}${data.taken ? `, ${data.actions[data.taken[index]]}` : ""}`);
  showFacts(view, index);
  drawBars(view, index);
  drawPicture(state.view, environment, step);
  if (!element("around").hidden && !detail.held) drawDetail();
  overview.place(step);
  detail.place(step);
  // Not `disabled`, which would take the keyboard's focus away.
  for (const id of ["back", "previous-episode"]) element(id).setAttribute("aria-disabled", step === 0);
  element("forward").setAttribute("aria-disabled", step === data.time - 1);
  element("next-episode").setAttribute("aria-disabled", episodeAfter() === null);
}

function showFacts(view, index) {
  const facts = [];
  if (data.taken) facts.push(["action", data.actions[data.taken[index]], data.taken[index]]);
  if (data.action) {
    const count = data.action.length / data.steps;
    facts.push(["action", [...data.action.subarray(index * count, (index + 1) * count)].map(number).join(", ")]);
  }
  if (data.reward) facts.push(["reward", number(data.reward[index])], ["return so far", number(data.so_far[index])]);
  facts.push(["sum of relevance", signed(view.total[index])]);
  if (data.ledger) {
    ["target", "arrived at inputs", "absorbed", "gap"].forEach((name, i) => facts.push([name, number(data.ledger[4 * index + i])]));
  }
  element("facts").replaceChildren(
    ...facts.map(([name, text, action]) => {
      const pair = document.createElement("div");
      const term = document.createElement("dt");
      const meaning = document.createElement("dd");
      term.textContent = name;
      meaning.textContent = text;
      if (action !== undefined) {
        meaning.className = "chip";
        meaning.style.setProperty("--chip", `var(--a${action % 8})`);
      }
      pair.append(term, meaning);
      return pair;
    }),
  );
}

function drawDetail() {
  const from = Math.max(0, Math.min(data.time - WINDOW, state.step - WINDOW / 2));
  element("around-title").textContent = `Around it: steps ${from} to ${from + WINDOW - 1}`;
  detail.draw(data.views[state.view], state.environment, from, from + WINDOW, element("lines").checked);
}

function drawTime() {
  // Where there is a detail, lines have more room there.
  const lines = element("lines").checked && element("around").hidden;
  overview.draw(data.views[state.view], state.environment, 0, data.time, lines);
  detail.from = 0;
  detail.to = data.time;
}

async function showView(view, environment) {
  Object.assign(state, { view, environment });
  const shown = data.views[view];
  await readView(shown);
  if (state.view !== view) return; // another was chosen meanwhile
  makeBars(shown);
  drawRamp(shown);
  element("choose-lines").hidden = !shown.observed;
  for (const table of document.querySelectorAll("#summaries [data-view]")) table.hidden = Number(table.dataset.view) !== view;
  drawTime();
  showStep();
}

function episodeAfter() {
  for (let step = state.step + 1; step < data.time; step++) if (data.starts[at(step)]) return step;
  return null;
}

function episodeBefore() {
  for (let step = state.step - 1; step > 0; step--) if (data.starts[at(step)]) return step;
  return 0;
}

function play(on) {
  if (playing) cancelAnimationFrame(playing.request);
  playing = null;
  element("play").textContent = on ? "pause" : "play";
  element("play").setAttribute("aria-pressed", String(on));
  if (!on) return;
  if (state.step === data.time - 1) goTo(0);
  playing = { since: performance.now(), request: 0 };
  const tick = (now) => {
    const due = Math.floor(((now - playing.since) * Number(element("speed").value)) / 1000);
    if (due > 0) {
      playing.since = now;
      goTo(state.step + due);
    }
    if (state.step === data.time - 1) play(false);
    else playing.request = requestAnimationFrame(tick);
  };
  playing.request = requestAnimationFrame(tick);
}

const KEYS = {
  ArrowLeft: (event) => goTo(state.step - (event.shiftKey ? 10 : 1)),
  ArrowRight: (event) => goTo(state.step + (event.shiftKey ? 10 : 1)),
  Home: () => goTo(0),
  End: () => goTo(data.time - 1),
  "[": () => goTo(episodeBefore()),
  "]": () => goTo(episodeAfter() ?? state.step),
  " ": () => play(!playing),
};

function listen() {
  document.addEventListener("keydown", (event) => {
    const own = event.target.closest("select, input, button, summary, a"); // these have keys of their own
    const free = !own || own.id === "step" || (own.tagName === "BUTTON" && event.key !== " ");
    if (!(event.key in KEYS) || event.ctrlKey || event.metaKey || event.altKey || !free) return;
    event.preventDefault();
    KEYS[event.key](event);
  });
  element("step").addEventListener("input", () => goTo(Number(element("step").value)));
  element("play").addEventListener("click", () => play(!playing));
  element("back").addEventListener("click", () => goTo(state.step - 1));
  element("forward").addEventListener("click", () => goTo(state.step + 1));
  element("previous-episode").addEventListener("click", () => goTo(episodeBefore()));
  element("next-episode").addEventListener("click", () => goTo(episodeAfter() ?? state.step));
  for (const id of ["overlay", "opacity", "grey"]) element(id).addEventListener("input", showStep);
  const choose = () => showView(Number(element("view").value), Number(element("environment").value));
  for (const id of ["view", "environment"]) element(id).addEventListener("change", choose);
  const redraw = () => {
    palette = shades();
    drawRamp(data.views[state.view]);
    drawTime();
    showStep();
  };
  element("lines").addEventListener("input", redraw);
  dark.addEventListener("change", redraw);
  new ResizeObserver(redraw).observe(overview.field);
}

function options(id, names) {
  element(id).replaceChildren(...names.map((name, i) => new Option(name, i)));
  element(`choose-${id}`).hidden = names.length < 2;
}

// Cells of the summary are coloured in the scale of their table.
function tint() {
  for (const table of document.querySelectorAll("#summaries table")) {
    const cells = [...table.querySelectorAll("[data-value]")].filter((cell) => cell.dataset.value !== "nan");
    const top = Math.max(...cells.map((cell) => Math.abs(cell.dataset.value)), 0) || 1;
    for (const cell of cells) {
      const value = Number(cell.dataset.value);
      cell.className = sign(value);
      const part = Math.round((Math.abs(value) / top) * 40);
      cell.style.background = `color-mix(in srgb, var(--${value > 0 ? "for" : "against"}-bar) ${part}%, transparent)`;
    }
  }
}

async function start() {
  await readAll();
  data.lowest = data.reward ? data.reward.reduce((a, b) => Math.min(a, b)) : 0;
  data.highest = data.reward ? data.reward.reduce((a, b) => Math.max(a, b)) : 0;
  options("view", data.views.map((view) => view.label || "the target"));
  options("environment", Array.from({ length: data.environments }, (_, i) => `${i}`));
  element("step").max = data.time - 1;
  element("around").hidden = data.time < 2 * WINDOW;
  element("picture").hidden = !pictures;
  document.querySelector(".stage").classList.toggle("unseen", !pictures);
  const did = data.taken ? [...new Set(data.taken)].sort((a, b) => a - b) : [];
  element("legend").replaceChildren(
    ...did.map((action) => {
      const entry = document.createElement("li");
      entry.className = "chip";
      entry.style.setProperty("--chip", `var(--a${action % 8})`);
      entry.textContent = data.actions[action];
      return entry;
    }),
  );
  element("player").hidden = false;
  tint();
  await showView(0, 0);
  listen();
}

start().catch((error) => {
  element("failure").hidden = false;
  element("failure").textContent = `The page cannot be drawn: ${error.message}. It needs a browser of 2023 or later.`;
  throw error;
});
