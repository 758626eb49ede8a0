"use strict";
(async () => {
  const read = id => document.getElementById(id).textContent;
  const figures = JSON.parse(read("figures"));
  const style = getComputedStyle(document.documentElement);
  // Colours are named after properties of the style sheet, which differ in the dark.
  const coloured = value => typeof value === "string" && value.startsWith("--") ? style.getPropertyValue(value).trim()
    : Array.isArray(value) ? value.map(coloured)
    : value && typeof value === "object" ? Object.fromEntries(Object.entries(value).map(([k, v]) => [k, coloured(v)]))
    : value;
  const axis = own => ({ automargin: true, gridcolor: "--line", linecolor: "--line", zerolinecolor: "--muted",
    fixedrange: true, ...own, title: { standoff: 8, ...own?.title } });
  const draw = (figure, place) => {
    const element = document.getElementById(`figure-${place + 1}`);
    const layout = { margin: { l: 8, r: 8, t: 12, b: 8 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, sans-serif", size: 12, color: "--text" }, dragmode: false, hovermode: "closest",
      hoverlabel: { bgcolor: "--panel", bordercolor: "--line", font: { color: "--text" } },
      legend: { orientation: "h", yref: "container", y: 0, yanchor: "bottom", x: 0 }, ...figure.layout,
      width: element.clientWidth, xaxis: axis(figure.layout.xaxis), yaxis: axis(figure.layout.yaxis) };
    const traces = figure.data.map(trace => trace.type === "heatmap" && trace.showscale !== false
      ? { ...trace, colorbar: { ...trace.colorbar, tickfont: { color: "--text" } } } : trace);
    return Plotly.react(element, coloured(traces), coloured(layout), { displayModeBar: false });
  };
  try {
    const packed = Uint8Array.from(atob(read("plotly")), letter => letter.charCodeAt(0));
    const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const code = document.createElement("script");
    code.text = await new Response(unpacked).text();
    document.head.append(code);
    document.documentElement.classList.add("drawn");
    const all = () => figures.forEach(draw);
    all();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", all);
    let waiting;
    addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(all, 150); });
    // On paper figures are as wide as the text, and the recipe is open.
    const print = on => {
      document.documentElement.classList.toggle("printing", on);
      document.querySelectorAll("details:has(> pre)").forEach(element => { element.open = on; });
      all();
    };
    addEventListener("beforeprint", () => print(true));
    addEventListener("afterprint", () => print(false));
  } catch (error) {
    console.error(error);
  }
})();
