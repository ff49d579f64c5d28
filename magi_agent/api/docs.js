"use strict";
(async () => {
  const element = (name, attributes = {}, ...content) => {
    const made = Object.assign(document.createElement(name), attributes);
    made.append(...content);
    return made;
  };
  // Characters of an answer that goes on.
  const MOST_SHOWN = 20000;
  const byId = (id) => document.getElementById(id);
  const base = location.pathname.replace(/\/api\/docs\/?$/, "");

  const answer = await fetch(`${base}/api/openapi.json`);
  const api = await answer.json();
  if (!answer.ok) {
    byId("description").textContent = api.message;
    return;
  }
  byId("title").textContent = `${api.info.title} API ${api.info.version}`;
  byId("description").textContent = api.info.description;

  // A schema as a person reads it: names of other schemas are links, the rest is JSON.
  const typeOf = (schema) => {
    if (!schema) return ["nothing"];
    if (schema.$ref) {
      const name = schema.$ref.split("/").pop();
      return [element("a", { href: `#schema-${name}` }, name)];
    }
    if (schema.allOf) return typeOf(schema.allOf[0]);
    const either = schema.anyOf || schema.oneOf;
    if (either) return either.flatMap((one, index) => (index ? [" or ", ...typeOf(one)] : typeOf(one)));
    if (schema.enum) return [schema.enum.map((one) => JSON.stringify(one)).join(" | ")];
    if (schema.const !== undefined) return [JSON.stringify(schema.const)];
    if (schema.prefixItems) {
      return ["[", ...schema.prefixItems.flatMap((one, index) => [index ? ", " : "", ...typeOf(one)]), "]"];
    }
    if (schema.type === "array") return ["list of ", ...typeOf(schema.items || { type: "anything" })];
    if (schema.type === "object" && typeof schema.additionalProperties === "object") {
      return ["map of ", ...typeOf(schema.additionalProperties)];
    }
    return [schema.type || "anything"];
  };

  const row = (...cells) => element("tr", {}, ...cells.map((cell) => element("td", {}, ...[cell].flat())));

  const example = (schema, depth = 0) => {
    if (!schema || depth > 6) return null;
    if (schema.$ref) return example(api.components.schemas[schema.$ref.split("/").pop()], depth + 1);
    if (schema.default !== undefined) return schema.default;
    if (schema.enum) return schema.enum[0];
    if (schema.anyOf) return example(schema.anyOf[0], depth + 1);
    if (schema.type === "object") {
      const required = (schema.required || []).map((key) => [key, example(schema.properties[key], depth + 1)]);
      return Object.fromEntries(required);
    }
    return { array: [], string: "", boolean: true, integer: 0, number: 0 }[schema.type] ?? null;
  };

  const tryIt = (method, path, operation) => {
    const form = element("form");
    const fields = operation.parameters.map((parameter) => {
      const input = element("input", { required: parameter.required === true, title: parameter.description });
      form.append(element("label", {}, parameter.name, input));
      return [parameter, input];
    });
    let body = null;
    if (operation.requestBody) {
      const schema = operation.requestBody.content["application/json"].schema;
      body = element("textarea", { value: JSON.stringify(example(schema), null, 2), spellcheck: false });
      form.append(element("label", {}, "body", body));
    }
    const shown = element("pre", { hidden: true });
    let going = null;
    form.append(element("button", { textContent: "Send" }), shown);
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      let target = base + path;
      const query = new URLSearchParams();
      const headers = {};
      for (const [parameter, input] of fields) {
        if (parameter.in === "path") {
          target = target.replace(`{${parameter.name}}`, encodeURIComponent(input.value));
        } else if (input.value !== "" && parameter.in === "header") {
          headers[parameter.name] = input.value;
        } else if (input.value !== "") {
          query.set(parameter.name, input.value);
        }
      }
      if (query.size) target += `?${query}`;
      // What goes on and on ends when it is asked for again.
      if (going) going.abort();
      going = new AbortController();
      const options = { method: method.toUpperCase(), headers, signal: going.signal };
      if (body) {
        options.body = body.value;
        headers["Content-Type"] = "application/json";
      }
      shown.hidden = false;
      shown.textContent = "…";
      try {
        const reply = await fetch(target, options);
        const took = reply.headers.get("X-Response-Time");
        const heading = `${reply.status} ${reply.statusText}  ${took ?? ""}\n\n`;
        if (/event-stream|ndjson/.test(reply.headers.get("Content-Type"))) {
          const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
          let said = "";
          for (let piece = await reader.read(); !piece.done; piece = await reader.read()) {
            said = (said + piece.value).slice(-MOST_SHOWN);
            shown.textContent = heading + said;
          }
          return;
        }
        const text = await reply.text();
        let content = text;
        try {
          content = JSON.stringify(JSON.parse(text), null, 2);
        } catch {
          // It is shown as it came.
        }
        shown.textContent = heading + content;
      } catch (error) {
        if (error.name !== "AbortError") shown.textContent = String(error);
      }
    });
    return form;
  };

  const sections = new Map(api.tags.map((tag) => [tag.name, [element("h2", {}, tag.name)]]));
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const [method, operation] of Object.entries(methods)) {
      const responses = Object.entries(operation.responses).map(([status, response]) => {
        const content = Object.values(response.content || {})[0];
        return row(element("code", {}, status), response.description, typeOf(content && (content["x-itemSchema"] || content.schema)));
      });
      sections.get(operation.tags[0]).push(
        element(
          "details",
          {},
          element(
            "summary",
            {},
            element("code", { className: `method ${method}` }, method.toUpperCase()),
            element("code", {}, path),
            element("span", { className: "summary" }, operation.summary),
          ),
          element("div", {}, element("table", {}, ...responses), tryIt(method, path, operation)),
        ),
      );
    }
  }
  for (const parts of sections.values()) byId("operations").append(...parts);

  byId("schemas").append(element("h2", {}, "schemas"));
  for (const [name, schema] of Object.entries(api.components.schemas)) {
    const required = new Set(schema.required || []);
    const rows = Object.entries(schema.properties || {}).map(([key, one]) =>
      row(element("code", {}, key + (required.has(key) ? "" : "?")), typeOf(one), one.description || ""),
    );
    byId("schemas").append(
      element(
        "details",
        { id: `schema-${name}` },
        element("summary", {}, element("code", {}, name)),
        element("div", {}, schema.description || "", ...(rows.length ? [element("table", {}, ...rows)] : typeOf(schema))),
      ),
    );
  }
  addEventListener("hashchange", () => {
    const target = document.getElementById(location.hash.slice(1));
    if (target) target.open = true;
  });
})();
