(function () {
  "use strict";
  var PAGE = 12; // cards added at a time
  var cards = JSON.parse(document.getElementById("cards").textContent);
  var gallery = document.getElementById("gallery");
  var PALETTE = gallery.dataset.palette.split(" ");
  var INK = gallery.dataset.ink.split(" "); // of a digit on each colour
  var tools = document.getElementById("tools");
  var more = document.getElementById("more");
  var zoom = document.getElementById("zoom");
  var state = { filter: "all", sort: "sample", digits: false, shown: PAGE };

  function escaped(text) {
    return text.replace(/[&<>"']/g, function (c) { return "&#" + c.charCodeAt(0) + ";"; });
  }

  function rowsOf(text) {
    return text.split("|");
  }

  // One path per colour, runs of cells in a row drawn as one. A cross, around a digit a frame, marks
  // each cell that differs from `truth`, if that has the same size.
  function picture(text, truth, label, longest) {
    var rows = rowsOf(text), height = rows.length, width = rows[0].length;
    var cell = Math.min(longest / 5, longest / Math.max(height, width));
    var paths = {}, marks = "", ink = "", lines = "";
    var withDigits = state.digits && cell >= 6;
    var other = truth === null ? null : rowsOf(truth);
    var same = other !== null && other.length === height && other[0].length === width;
    rows.forEach(function (row, r) {
      for (var c = 0; c < width;) {
        var end = c;
        while (end < width && row[end] === row[c]) { end++; }
        paths[row[c]] = (paths[row[c]] || "") +
          "M" + c + " " + r + "h" + (end - c) + "v1h-" + (end - c) + "z";
        c = end;
      }
      for (var k = 0; k < width; k++) {
        if (same && other[r][k] !== row[k]) {
          marks += withDigits ? "M" + (k + 0.12) + " " + (r + 0.12) + "h.76v.76h-.76z" :
            "M" + (k + 0.2) + " " + (r + 0.2) + "l.6 .6M" + (k + 0.8) + " " + (r + 0.2) + "l-.6 .6";
        }
        if (withDigits) {
          ink += '<text x="' + (k + 0.5) + '" y="' + (r + 0.74) + '" fill="' +
            INK[+row[k]] + '">' + row[k] + "</text>";
        }
      }
    });
    for (var y = 1; y < height; y++) { lines += "M0 " + y + "h" + width; }
    for (var x = 1; x < width; x++) { lines += "M" + x + " 0v" + height; }
    var inside = Object.keys(paths).map(function (k) {
      return '<path fill="' + PALETTE[k] + '" d="' + paths[k] + '"/>';
    }).join("") + '<path d="' + lines + '" stroke="#6a727c" stroke-width=".05" fill="none"/>';
    if (ink) { inside += '<g font-size=".66" text-anchor="middle" font-family="monospace">' + ink + "</g>"; }
    if (marks) {
      inside += '<path class="cross" d="' + marks + '" stroke="#000" stroke-width=".3" stroke-linecap="round" fill="none"/>' +
        '<path d="' + marks + '" stroke="#fff" stroke-width=".13" stroke-linecap="round" fill="none"/>';
    }
    return '<svg class="grid-picture" role="img" aria-label="' + escaped(label) + '" viewBox="0 0 ' +
      width + " " + height + '" width="' + (width * cell).toFixed(1) + '" height="' +
      (height * cell).toFixed(1) + '">' + inside + "</svg>";
  }

  function sizeOf(text) {
    var rows = rowsOf(text);
    return rows.length + " x " + rows[0].length;
  }

  function element(tag, className, text) {
    var made = document.createElement(tag);
    if (className) { made.className = className; }
    if (text !== undefined) { made.textContent = text; }
    return made;
  }

  // verdict: "right", "wrong", "unknown" or "" (nothing to judge); compared: draw crosses
  function figure(card, number, name, verdict, words, longest, compared) {
    var grid = card.g[number], truth = compared && card.truth !== null ? card.g[card.truth] : null;
    var made = element("figure"), caption = element("figcaption");
    var label = name + ", " + sizeOf(grid) + (words ? ", " + words : "") +
      " (" + card.id + ", test " + card.test + ")";
    var holder = made;
    if (longest > 110) {
      holder = element("button", "zoom");
      holder.type = "button";
      holder.setAttribute("aria-label", label + ". Enlarge");
      holder.addEventListener("click", function () {
        var most = Math.max(160, Math.min(window.innerWidth - 80, window.innerHeight - 140, 620));
        zoom.querySelector("div").innerHTML = picture(grid, truth, label, most);
        zoom.showModal();
      });
      made.appendChild(holder);
    }
    holder.innerHTML = picture(grid, truth, label, longest);
    var sign = verdict === "right" ? "\u2713 " : verdict === "wrong" ? "\u2717 " : "";
    caption.appendChild(element("span", verdict === "right" || verdict === "wrong" ? verdict : "", sign + name));
    caption.appendChild(document.createElement("br"));
    caption.appendChild(element("small", "", words || sizeOf(grid)));
    made.appendChild(caption);
    return made;
  }

  function strip(title, parts) {
    var made = document.createDocumentFragment(), row = element("div", "strip");
    made.appendChild(element("h4", "", title));
    parts.forEach(function (part) { row.appendChild(part); });
    made.appendChild(row);
    return made;
  }

  function drawn(card) {
    var made = element("article", "card box"), head = element("h3");
    var phone = window.innerWidth < 600, large = phone ? 140 : 176, small = phone ? 66 : 84;
    made.dataset.state = card.state;
    made.dataset.task = card.id;
    head.appendChild(element("span", "", card.id + ", test " + card.test));
    head.appendChild(element("span", "badge " + (card.state === "solved" ? "good" : card.state === "unknown" ? "plain" : "bad"),
      (card.state === "solved" ? "\u2713 " : card.state === "unknown" ? "" : "\u2717 ") + card.says));
    card.flags.forEach(function (flag) {
      head.appendChild(element("span", "badge plain", flag === "won" ? "refinement mended it in a view" : "lost by refinement"));
    });
    made.appendChild(head);

    var answers = [figure(card, card.query, "query", "", "", large, false)];
    card.attempts.forEach(function (attempt, i) {
      answers.push(figure(card, attempt.g, "attempt " + (i + 1), attempt.is, attempt.says, large, true));
    });
    if (card.truth !== null) { answers.push(figure(card, card.truth, "truth", "", "", large, false)); }
    made.appendChild(strip("Query and answer", answers));

    var why = element("ul", "why");
    card.attempts.forEach(function (attempt, i) {
      why.appendChild(element("li", "", "Attempt " + (i + 1) + ": " + attempt.by));
    });
    made.appendChild(why);

    var demonstrations = card.demos.map(function (pair, i) {
      var one = element("div", "pair");
      one.appendChild(figure(card, pair[0], "input " + (i + 1), "", "", small, false));
      one.appendChild(element("span", "", "\u2192"));
      one.appendChild(figure(card, pair[1], "output " + (i + 1), "", "", small, false));
      return one;
    });
    if (card.more) { demonstrations.push(element("p", "quiet", "and " + card.more + " more")); }
    made.appendChild(strip("Demonstrations", demonstrations));

    var inner = element("details"), summary = element("summary", "", "Planning steps and refinement");
    inner.appendChild(summary);
    inner.addEventListener("toggle", function () {
      if (!inner.open || inner.children.length > 1) { return; }
      var steps = card.steps, n = steps.n, refined = card.refined;
      var parts = [figure(card, steps.first, "step 1", steps.is[0], "", large, true)];
      if (n > 1) { parts.push(figure(card, steps.last, "step " + n, steps.is[1], "", large, true)); }
      if (refined && refined.before !== steps.last) {
        parts.push(figure(card, refined.before, "before refinement", refined.is[0], "", large, true));
      }
      if (refined && refined.taken) {
        parts.push(figure(card, refined.after, "after refinement", refined.is[1], "", large, true));
      }
      var words = n > 1 ? "Step 1 to " + n + ": " + steps.says + ". " : "One planning step was enough. ";
      words += refined ? "Refinement: " + refined.says + "." : "No policy ran.";
      inner.appendChild(strip(words, parts));
    });
    made.appendChild(inner);
    return made;
  }

  function cells(card) {
    return Math.max.apply(null, card.g.map(function (grid) { return grid.length; }));
  }

  var ORDERS = {
    best: function (a, b) { return b.share - a.share; },
    worst: function (a, b) { return a.share - b.share; },
    small: function (a, b) { return cells(a) - cells(b); },
    id: function (a, b) { return a.id < b.id ? -1 : a.id > b.id ? 1 : a.test - b.test; }
  };

  function chosen() {
    var some = cards.filter(function (card) {
      return state.filter === "all" || card.state === state.filter || card.flags.indexOf(state.filter) >= 0;
    });
    return ORDERS[state.sort] ? some.sort(ORDERS[state.sort]) : some;
  }

  function show(from) {
    var some = chosen(), until = Math.min(state.shown, some.length);
    if (!from) { gallery.textContent = ""; }
    some.slice(from, until).forEach(function (card) { gallery.appendChild(drawn(card)); });
    more.hidden = until >= some.length;
    document.getElementById("count").textContent = some.length ? until + " of " + some.length + " shown" : "None.";
  }

  tools.querySelectorAll("[data-filter]").forEach(function (button) {
    button.addEventListener("click", function () {
      state.filter = button.dataset.filter;
      state.shown = PAGE;
      tools.querySelectorAll("[data-filter]").forEach(function (one) {
        one.setAttribute("aria-pressed", String(one === button));
      });
      show(0);
    });
  });
  document.getElementById("sort").addEventListener("change", function (event) {
    state.sort = event.target.value;
    state.shown = PAGE;
    show(0);
  });
  document.getElementById("digits").addEventListener("click", function (event) {
    state.digits = !state.digits;
    event.currentTarget.setAttribute("aria-pressed", String(state.digits));
    show(0);
  });
  more.addEventListener("click", function () {
    var from = Math.min(state.shown, chosen().length);
    state.shown += PAGE;
    show(from);
    var next = gallery.children[from];
    if (next) { next.tabIndex = -1; next.focus({ preventScroll: true }); }
  });
  tools.hidden = false;
  show(0);
})();
