// The page of mainrun-report: pictures, one choice of runs in all of them, a table to sort and filter, and a state that outlives a reload.
"use strict";
(() => {
  const page = JSON.parse(document.getElementById("data").textContent);
  const all = (selector, from = document) => [...from.querySelectorAll(selector)];
  const where = `mainrun-report:${location.pathname}`;
  const state = { sort: null, find: "", one: [], axis: "step", late: true, open: [], y: 0 };
  try { Object.assign(state, JSON.parse(sessionStorage.getItem(where) || "{}")); } catch { /* nothing kept, or nothing may be */ }
  const keep = () => { try { sessionStorage.setItem(where, JSON.stringify({ ...state, y: scrollY })); } catch { /* nothing may be kept */ } };

  // Pictures. Every one knows the signals `one` (names of the chosen runs), `axis` and `late`.
  const views = [];
  const told = () => views.forEach(view => view.signal("one", state.one).signal("axis", state.axis).signal("late", state.late).runAsync());

  const specOf = el => {
    const spec = structuredClone(page.charts[el.dataset.chart]);
    const run = el.dataset.run;
    if (run !== undefined) {  // the curves, of one run
      spec.datasets.curves = spec.datasets.curves.filter(d => d.run === run);
      spec.datasets.references = spec.datasets.references.filter(d => d.runs.includes(run)).map(d => ({ ...d, everywhere: true }));
      for (const param of spec.params) if (param.name in page.limits[run]) param.value = page.limits[run][param.name];
    }
    return spec;
  };

  async function draw(el) {
    if (el.dataset.state) return;
    el.dataset.state = "drawing";
    const tooltip = { theme: "page", disableDefaultStyle: true };
    const { view } = await vegaEmbed(el, specOf(el), { renderer: "svg", ast: true, actions: false, tooltip });
    views.push(view);
    for (const part of el.children) part.setAttribute("aria-hidden", "true");  // the picture has a text; its hundreds of marks have none
    view.addEventListener("click", (event, item) => {
      const run = item && item.datum && item.datum.run;
      choose(run && state.one.join() !== run ? [run] : []);
    });
    await view.signal("one", state.one).signal("axis", state.axis).signal("late", state.late).runAsync();
    el.dataset.state = "drawn";
  }

  // One choice: rows of the table, lines and points.
  const said = document.getElementById("said");
  function choose(runs) {
    state.one = runs;
    for (const row of all(".board tbody tr")) {
      const chosen = runs.length > 0 && JSON.parse(row.dataset.runs).some(name => runs.includes(name));
      row.classList.toggle("chosen", chosen);
      row.querySelector("th button").setAttribute("aria-pressed", String(chosen));
    }
    said.textContent = runs.length ? `Only ${runs.length > 1 ? `${runs.length} runs` : runs[0]} in the pictures.` : "";
    for (const button of all(".everything")) button.hidden = !runs.length;
    told();
    keep();
  }
  for (const row of all(".board tbody tr")) {
    row.querySelector("th button").addEventListener("click", () => {
      const runs = JSON.parse(row.dataset.runs);
      choose(runs.join() === state.one.join() ? [] : runs);
    });
  }
  for (const button of all(".everything")) button.addEventListener("click", () => choose([]));
  addEventListener("keydown", event => { if (event.key === "Escape") choose([]); });

  // The table.
  const board = document.querySelector(".board");
  const rows = board ? all("tbody tr", board) : [];
  const order = new Map(rows.map((row, i) => [row, i]));
  function sort() {
    const heads = all("thead th", board);
    heads.forEach((head, i) => head.setAttribute("aria-sort", state.sort && state.sort[0] === i ? state.sort[1] : "none"));
    const by = state.sort;
    const value = row => { const cell = row.cells[by[0]]; return "value" in cell.dataset ? parseFloat(cell.dataset.value) : cell.textContent.trim(); };
    const sign = by && by[1] === "descending" ? -1 : 1;
    const compare = (a, b) => {
      if (!by) return order.get(a) - order.get(b);
      const [x, y] = [value(a), value(b)];
      const [none, other] = [x === "" || Number.isNaN(x), y === "" || Number.isNaN(y)];
      if (none || other) return none - other || order.get(a) - order.get(b);  // what has no value comes last, either way
      const apart = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y), "en", { numeric: true });
      return sign * apart || order.get(a) - order.get(b);
    };
    board.tBodies[0].append(...[...rows].sort(compare));
  }
  function filter() {
    const words = state.find.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = row.dataset.words;
      row.hidden = !words.every(word => text.includes(word));
      shown += !row.hidden;
    }
    document.getElementById("count").textContent = words.length ? `${shown} of ${rows.length} shown` : "";
  }
  if (board) {
    all("thead th", board).forEach((head, i) => head.querySelector("button").addEventListener("click", () => {
      const [at, way] = state.sort || [];
      state.sort = at !== i ? [i, "ascending"] : way === "ascending" ? [i, "descending"] : null;
      sort();
      keep();
    }));
    const find = document.getElementById("find");
    find.value = state.find;
    find.addEventListener("input", () => { state.find = find.value; filter(); keep(); });
    sort();
    filter();
  }

  // What the curves run along.
  for (const input of all("input[name=axis]")) {
    input.checked = input.value === state.axis;
    input.addEventListener("change", () => { state.axis = input.value; told(); keep(); });
  }
  for (const input of all("input[name=late]")) {
    input.checked = state.late;
    input.addEventListener("change", () => { state.late = input.checked; told(); keep(); });
  }

  // A run's own part, and what is drawn when.
  const drawIn = part => Promise.all(all(".chart", part).map(draw));
  for (const part of all("details[id]")) {
    part.open = state.open.includes(part.id);
    part.addEventListener("toggle", () => {
      state.open = all("details[id][open]").map(d => d.id);
      if (part.open) drawIn(part);
      keep();
    });
  }
  function openTarget() {
    const part = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (part && part.tagName === "DETAILS") part.open = true;
  }
  addEventListener("hashchange", openTarget);
  addEventListener("pagehide", keep);

  (async () => {
    for (const chart of all(".chart")) if (!chart.closest("details:not([open])")) await draw(chart);
    choose(state.one);
    openTarget();
    if (page.live) {
      scrollTo(0, state.y);
      setTimeout(() => { keep(); location.reload(); }, 1000 * page.live);
    }
    document.documentElement.dataset.ready = "1";
  })();
})();
