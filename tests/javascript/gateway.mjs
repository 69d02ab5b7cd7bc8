// The example's code names http://localhost:3000; here that is the gateway of the test, whatever its port.
const whole = globalThis.fetch
const base = process.env.GATEWAY

globalThis.fetch = (url, options) => whole(String(url).replace('http://localhost:3000', base), options)

export function tell(found) {
  process.stdout.write(JSON.stringify(found) + '\n')
}
