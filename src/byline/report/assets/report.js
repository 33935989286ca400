"use strict";
(function () {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");

  // Colours live in the style sheet alone, so that plots and page never disagree.
  function colour(name) {
    return getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  }

  function draw() {
    const font = getComputedStyle(document.body).fontFamily;
    for (const plot of figures) {
      const data = plot.figure.data.map(function (trace) {
        if (trace.meta === "front") {
          return { ...trace, line: { ...trace.line, color: colour("ink") } };
        }
        const own = colour("k-" + trace.meta);
        return {
          ...trace,
          line: { ...trace.line, color: own },
          marker: { ...trace.marker, color: own, line: { color: colour("paper"), width: 1 } },
          error_y: { ...trace.error_y, color: own },
          textfont: { ...trace.textfont, color: colour("ink") },
          hoverlabel: { align: "left", bgcolor: colour("raised"), bordercolor: own, font: { color: colour("ink"), family: font, size: 13 } }
        };
      });
      const axis = { gridcolor: colour("grid"), linecolor: colour("line"), zeroline: false, ticks: "", automargin: false, fixedrange: true };
      const base = plot.figure.layout;
      const layout = {
        ...base,
        paper_bgcolor: "rgba(0,0,0,0)",
        plot_bgcolor: "rgba(0,0,0,0)",
        font: { family: font, size: 12, color: colour("soft") },
        xaxis: { ...axis, ...base.xaxis, showline: true, tickangle: 0 },
        yaxis: { ...axis, ...base.yaxis }
      };
      Plotly.react("plot-" + plot.key, data, layout, { displayModeBar: false, responsive: true });
    }
  }

  draw();
  dark.addEventListener("change", draw);
  // Ink on paper: plots are drawn again in the colours of the print style sheet.
  window.matchMedia("print").addEventListener("change", draw);
})();
