"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const root = document.documentElement;

  const theme = document.getElementById("theme");
  const setTheme = (name) => (name === "auto" ? delete root.dataset.theme : (root.dataset.theme = name));
  theme.addEventListener("change", () => {
    setTheme(theme.value);
    try { localStorage.setItem("rmoe-theme", theme.value); } catch { /* a page from a file may have no storage */ }
  });
  try { theme.value = localStorage.getItem("rmoe-theme") || "auto"; } catch { /* likewise */ }
  setTheme(theme.value);

  const draw = (box) => {
    const chart = box.dataset.key === undefined ? charts[box.dataset.chart] : charts[box.dataset.chart][box.dataset.key];
    const narrow = box.clientWidth < 600;
    const legends = chart.data.filter((trace) => trace.showlegend !== false && trace.type !== "heatmap").length;
    const below = Math.ceil(legends / (narrow ? 1 : 2)) * 20;
    const height = Math.min((chart.height || (box.classList.contains("tall") ? 440 : 360)) + (legends > 1 ? below : 0), 1600);
    const axis = { automargin: true, gridcolor: "#8884", zeroline: false };
    const layout = {
      ...chart.layout,
      xaxis: { ...axis, ...chart.layout.xaxis },
      yaxis: { ...axis, ...chart.layout.yaxis },
      height,
      margin: { l: 40, r: 12, t: narrow ? 8 : 32, b: 48 },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: "#888", activecolor: "#0072b2" },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, sans-serif", size: narrow ? 11 : 13 },
      legend: { orientation: "h", y: -0.25, yanchor: "top", x: 0, xanchor: "left" },
      showlegend: legends > 1,
      dragmode: narrow ? false : "zoom",
    };
    if (box.dataset.chart === "curves" && document.getElementById("logarithmic").checked) layout.yaxis.type = "log";
    box.style.height = `${height}px`;
    Plotly.react(box, chart.data, layout, { responsive: true, displaylogo: false, displayModeBar: narrow ? false : "hover" });
  };
  // A chart inside of closed details has no width: it is drawn when they open.
  const drawVisible = (within) => within.querySelectorAll("[data-chart]").forEach((box) => box.clientWidth && draw(box));
  drawVisible(document);
  document.querySelectorAll("details").forEach((one) => one.addEventListener("toggle", () => one.open && drawVisible(one)));

  document.querySelectorAll("[data-choose]").forEach((choice) =>
    choice.addEventListener("change", () => {
      const box = document.querySelector(`[data-chart="${choice.dataset.choose}"]`);
      box.dataset.key = choice.value;
      draw(box);
    }));
  const logarithmic = document.getElementById("logarithmic");
  if (logarithmic) logarithmic.addEventListener("change", () => draw(document.querySelector('[data-chart="curves"]')));

  // Paper shows what is folded away, but for whole configs.
  let opened = [];
  window.addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")].filter((one) => !one.querySelector(":scope > pre"));
    opened.forEach((one) => { one.open = true; drawVisible(one); });
    document.querySelectorAll(".js-plotly-plot").forEach((box) => Plotly.Plots.resize(box));
  });
  window.addEventListener("afterprint", () => opened.forEach((one) => { one.open = false; }));
  root.dataset.ready = "yes";
})();
