// The page of hiar_jax.serve: sends requests, plays what comes back by Media Source Extensions, and
// shows how things stand.

const $ = (id) => document.getElementById(id);
const video = $("video");
const KEEP = 60; // seconds of video kept behind the play head
const MOST = 15; // megabytes of a file to start from; the server takes one more

let socket = null;
let screen = null; // what is being played
let status = { state: "connecting" };
let pressed = 0; // when Start was, until something comes of it
let asked = 0; // when Start was pressed for what is being played
let prompts = new Map(); // of it: second -> prompt
let firstSeen = null; // seconds from there to the first picture
let pausedByHand = false;

// ----------------------------------------------------------------------------------------- playing

class Screen {
  constructor(mime) {
    this.queue = [];
    this.source = new MediaSource();
    this.url = URL.createObjectURL(this.source);
    video.src = this.url;
    this.source.addEventListener(
      "sourceopen",
      () => {
        this.buffer = this.source.addSourceBuffer(mime);
        this.buffer.addEventListener("updateend", () => this.feed());
        this.feed();
      },
      { once: true },
    );
    video.requestVideoFrameCallback?.(() => {
      firstSeen = (performance.now() - asked) / 1000;
      $("curtain").hidden = true;
    });
    video.play().catch(() => {});
  }

  add(bytes) {
    this.queue.push(bytes);
    this.feed();
  }

  feed() {
    const buffer = this.buffer;
    if (!buffer || buffer.updating || this.source.readyState === "closed") return;
    const start = buffer.buffered.length ? buffer.buffered.start(0) : 0;
    if (video.currentTime - start > 2 * KEEP) {
      buffer.remove(start, video.currentTime - KEEP);
    } else if (this.queue.length) {
      try {
        buffer.appendBuffer(this.queue[0]);
        this.queue.shift();
      } catch (error) {
        if (error.name !== "QuotaExceededError") throw error;
        buffer.remove(start, Math.max(start + 0.01, video.currentTime - 1));
      }
    }
    if (!pausedByHand && video.paused && this.seconds() > video.currentTime)
      video.play().catch(() => {});
  }

  seconds() {
    const ranges = this.buffer ? this.buffer.buffered : { length: 0 };
    return ranges.length ? ranges.end(ranges.length - 1) : 0;
  }

  close() {
    URL.revokeObjectURL(this.url);
  }
}

// ----------------------------------------------------------------------------------------- talking

function connect() {
  socket = new WebSocket(
    `${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/watch`,
  );
  socket.binaryType = "arraybuffer";
  socket.onmessage = (event) => {
    if (typeof event.data === "string") hear(JSON.parse(event.data));
    else screen?.add(event.data);
  };
  socket.onclose = (event) => {
    socket = null;
    show({ state: "away", why: event.reason });
    setTimeout(connect, 2000);
  };
}

function say(command, file = null) {
  if (socket?.readyState !== WebSocket.OPEN) return tell("The server is not there.");
  const text = JSON.stringify(command);
  socket.send(file ? new Blob([text, "\n", file]) : text);
}

function hear(news) {
  if (news.say === "status") return show(news);
  if (news.say === "refused") return tell(news.why);
  if (news.say === "prompt") return tell(`Block ${news.block} will be the first to show it.`);
  if (news.say === "given") return tell(news.done);
  if (news.say === "begin") {
    clear();
    $("download").href = news.clip;
    $("download").hidden = false;
    if (!window.MediaSource?.isTypeSupported(news.mime))
      return tell(`This browser does not play ${news.mime}; download the video instead.`);
    screen = new Screen(news.mime);
  }
}

// Makes room for another video; what is played until then was not stopped by asking for it.
function clear() {
  if (pressed) [asked, pressed, firstSeen, pausedByHand] = [pressed, 0, null, false];
  prompts = new Map();
  screen?.close();
  screen = null;
  $("caption").textContent = "";
  video.removeAttribute("src");
  video.load();
}

const tell = (text) => {
  $("message").textContent = text;
};

// ----------------------------------------------------------------------------------------- showing

const number = (value, digits = 1) =>
  value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const hue = (text) => [...text].reduce((sum, char) => (sum * 31 + char.codePointAt(0)) % 360, 7);
const chip = (text) => `hsl(${hue(text)} 60% 50%)`;

const STATES = {
  idle: () => "ready",
  connecting: () => "connecting",
  away: () => "the server is not there; trying again",
  waiting: (s) => {
    const others = s.max_generations === 1 ? "Another video is" : `${s.max_generations} other videos are`;
    return `${others} being made; ${s.before ? `${s.before} before you` : "you are next"}`;
  },
  starting: () => "starting",
  running: () => "making",
  paused: () => "paused",
  finished: () => "finished: extend it, or start another one",
  ended: (s) => `ended: ${s.why}`,
};

function show(news) {
  status = news;
  const alive = ["starting", "running", "paused", "finished"].includes(status.state);
  $("state").textContent = STATES[status.state](status);
  $("state").className = status.state;
  $("change").disabled = !(alive && status.state !== "starting");
  $("pause").disabled = !alive || status.state === "finished";
  $("pause").textContent = status.state === "paused" ? "Go on" : "Pause";
  $("extend").disabled = !(alive && status.target !== null);
  $("stop").disabled = !(alive || status.state === "waiting");
  if (["waiting", "starting"].includes(status.state)) {
    if (screen || pressed) clear();
    $("curtain").hidden = false;
    $("curtain").textContent = STATES[status.state](status);
  }
  if ("levels" in status) showFacts();
}

function showFacts() {
  const length = status.target === null ? "" : ` of ${number(status.target)}`;
  $("latency").textContent = firstSeen === null ? "–" : `${number(firstSeen, 2)} s`;
  $("latency").title = status.latency === null ? "" : `made after ${number(status.latency, 2)} s`;
  $("speed").textContent =
    status.speed === null
      ? "–"
      : `${number(status.speed)} frames/s, plays ${number(status.fps, status.fps % 1 ? 1 : 0)}`;
  $("made").textContent = `${number(status.seconds)}${length} s`;
  $("blocks").textContent = status.blocks;
  for (const [second, prompt] of status.prompts) prompts.set(second, prompt);
  showStrip();
  const remarks = status.remarks.join(" ");
  if (remarks && remarks !== showFacts.told) tell(remarks);
  showFacts.told = remarks;
  const rows = status.levels.map((level, i) => [
    `noise ${number(level.sigma, 2)}`,
    level.block,
    level.prompt,
    i ? "empty" : "next block",
  ]);
  const made = status.prompts.at(-1);
  rows.push(
    made
      ? ["finished", status.blocks - 1, made[1], "", "finished"]
      : ["finished", null, null, "nothing yet"],
  );
  while ($("levels").children.length < rows.length) $("levels").append(newRow());
  rows.forEach((row, i) => fillRow($("levels").children[i], ...row));
}

const span = () => Math.max(status.target ?? 0, status.seconds ?? 0) || 1;

// What was made, a part a prompt, and how far it was watched.
function showStrip() {
  const starts = [...prompts.keys()];
  $("strip").hidden = !starts.length;
  $("parts").replaceChildren(
    ...starts.map((start, i) => {
      const part = document.createElement("i");
      part.title = prompts.get(start);
      part.style.left = `${(100 * start) / span()}%`;
      part.style.width = `${(100 * ((starts[i + 1] ?? status.seconds) - start)) / span()}%`;
      part.style.setProperty("--chip", chip(prompts.get(start)));
      return part;
    }),
  );
}

function newRow() {
  const item = document.createElement("li");
  for (const part of ["level", "block", "says"]) {
    const cell = document.createElement("span");
    cell.className = part;
    item.append(cell);
  }
  return item;
}

function fillRow(item, name, block, prompt, otherwise, kind = "") {
  const [level, number, says] = item.children;
  item.className = block === null ? "empty" : kind;
  level.textContent = name;
  number.textContent = block ?? "";
  says.textContent = block === null ? otherwise : prompt || "(no prompt)";
  if (block !== null) says.style.setProperty("--chip", chip(prompt));
}

// --------------------------------------------------------------------------------------- the hands

function pause(wanted) {
  pausedByHand = wanted;
  if (wanted) video.pause();
  else video.play().catch(() => {});
  say({ do: wanted ? "pause" : "go" });
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const [file, length] = [$("given").files[0], $("length").value];
  if (file?.size > MOST * 2 ** 20)
    return tell(`${file.name} has ${number(file.size / 2 ** 20)} MB; at most ${MOST} can be sent.`);
  tell(file ? `Sending ${file.name}.` : "");
  pressed = performance.now();
  const command = {
    do: "start",
    prompt: $("prompt").value,
    seed: Number($("seed").value),
    seconds: length ? Number(length) : null,
  };
  if (file) say({ ...command, name: file.name }, file);
  else say(command);
});
$("given").onchange = () => {
  $("nothing").hidden = !$("given").files.length;
};
$("nothing").onclick = () => {
  $("given").value = "";
  $("nothing").hidden = true;
};
$("full").onclick = () =>
  document.fullscreenElement ? document.exitFullscreen() : $("screen").requestFullscreen();
$("strip").onclick = (event) => {
  const { left, width } = $("strip").getBoundingClientRect(),
    kept = screen?.buffer?.buffered;
  if (!kept?.length) return;
  const second = (span() * (event.clientX - left)) / width;
  video.currentTime = Math.min(Math.max(second, kept.start(0)), kept.end(kept.length - 1) - 0.05);
};
$("change").onclick = () =>
  say({ do: "prompt", prompt: $("prompt").value, recache: $("recache").checked });
$("pause").onclick = () => pause(status.state !== "paused");
$("extend").onclick = () => say({ do: "extend", seconds: 10 });
$("stop").onclick = () => say({ do: "stop" });
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if ($("change").disabled) $("form").requestSubmit();
  else $("change").click();
});

// A tab that is not looked at does not play; nothing is made for it meanwhile.
document.addEventListener("visibilitychange", () => {
  if (["starting", "running"].includes(status.state) && document.hidden) {
    pause(true);
    pausedByHand = false;
  } else if (status.state === "paused" && !document.hidden && !pausedByHand) pause(false);
});

setInterval(() => {
  if (!screen) return;
  $("watched").textContent = `${number(video.currentTime)} s`;
  $("caption").textContent =
    [...prompts].findLast(([second]) => second <= video.currentTime)?.[1] ?? "";
  $("head").style.left = `${100 * Math.min(1, video.currentTime / span())}%`;
  if (socket?.readyState === WebSocket.OPEN)
    socket.send(JSON.stringify({ do: "at", seconds: video.currentTime }));
}, 250);

connect();
