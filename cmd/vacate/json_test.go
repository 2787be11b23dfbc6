package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"vacate/internal/evict"
	fleetv1 "vacate/internal/fleet/api/v1"
	"vacate/internal/guest/inspect"
	"vacate/internal/guest/linux"
	"vacate/internal/guest/pageclass"
	hostv1 "vacate/internal/host/api/v1"

	"connectrpc.com/connect"
	"github.com/santhosh-tekuri/jsonschema/v6"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/known/timestamppb"
)

const schemaFile = "../../docs/schema.json"

type object = map[string]any

func ref(name string) object { return object{"$ref": "#/$defs/" + name} }

func closed(properties object) object {
	required := []string{}
	for name := range maps.Keys(properties) {
		required = append(required, name)
	}
	return object{"type": "object", "properties": properties, "required": required,
		"additionalProperties": false}
}

func orNull(schema object) object { return object{"anyOf": []object{schema, {"type": "null"}}} }

// ofMessage adds the schema of a message, and of those in it, to defs.
func ofMessage(defs object, m protoreflect.MessageDescriptor) object {
	name := string(m.Name())
	if m.ParentFile().Package() == fleetv1.File_internal_fleet_api_v1_fleet_proto.Package() {
		name = "fleet." + name
	}
	if m.FullName() == "google.protobuf.Timestamp" {
		return object{"type": "string", "format": "date-time"}
	}
	if _, ok := defs[name]; ok {
		return ref(name)
	}
	defs[name] = object{} // for a message in itself
	properties := object{}
	for i := range m.Fields().Len() {
		f := m.Fields().Get(i)
		var s object
		switch {
		case f.IsMap():
			s = object{"type": "object", "additionalProperties": ofField(defs, f.MapValue())}
		case f.IsList():
			s = object{"type": "array", "items": ofField(defs, f)}
		case f.HasPresence():
			s = orNull(ofField(defs, f))
		default:
			s = ofField(defs, f)
		}
		properties[string(f.Name())] = s
	}
	defs[name] = closed(properties)
	return ref(name)
}

func ofField(defs object, f protoreflect.FieldDescriptor) object {
	switch f.Kind() {
	case protoreflect.MessageKind:
		return ofMessage(defs, f.Message())
	case protoreflect.EnumKind:
		var names []string
		for i := range f.Enum().Values().Len() {
			names = append(names, string(f.Enum().Values().Get(i).Name()))
		}
		return object{"enum": names}
	case protoreflect.BoolKind:
		return object{"type": "boolean"}
	case protoreflect.StringKind, protoreflect.BytesKind:
		return object{"type": "string"}
	case protoreflect.DoubleKind:
		return object{"type": "number"}
	case protoreflect.Uint32Kind, protoreflect.Uint64Kind:
		return object{"type": "integer", "minimum": 0}
	}
	return object{"type": "integer"}
}

// ofType is the schema of what encoding/json makes of a type.
func ofType(t reflect.Type) object {
	if t.Implements(reflect.TypeFor[interface{ MarshalText() ([]byte, error) }]()) {
		return object{"type": "string"}
	}
	switch t.Kind() {
	case reflect.Pointer:
		return orNull(ofType(t.Elem()))
	case reflect.Slice:
		return object{"type": "array", "items": ofType(t.Elem())}
	case reflect.Map:
		return object{"type": "object", "additionalProperties": ofType(t.Elem())}
	case reflect.Struct:
		properties := object{}
		for i := range t.NumField() {
			name, options, _ := strings.Cut(t.Field(i).Tag.Get("json"), ",")
			if name == "" || options != "" {
				panic(fmt.Sprintf("%v.%s has the tag %q", t, t.Field(i).Name,
					t.Field(i).Tag.Get("json")))
			}
			properties[name] = ofType(t.Field(i).Type)
		}
		return closed(properties)
	case reflect.Bool:
		return object{"type": "boolean"}
	case reflect.String:
		return object{"type": "string"}
	case reflect.Float64:
		return object{"type": "number"}
	}
	return object{"type": "integer"}
}

// theSchema is what docs/schema.json has: a definition for each answer of the API and the command.
func theSchema() object {
	defs := object{}
	for _, s := range []protoreflect.ServiceDescriptor{
		hostv1.File_internal_host_api_v1_host_proto.Services().ByName("Host"),
		fleetv1.File_internal_fleet_api_v1_fleet_proto.Services().ByName("Fleet")} {
		for i := range s.Methods().Len() {
			if m := s.Methods().Get(i); m.FullName() != "vacate.fleet.v1.Fleet.Backup" {
				ofMessage(defs, m.Output())
			}
		}
	}
	defs["Stream"] = ofType(reflect.TypeFor[inspect.Stream]())
	defs["Record"] = ofType(reflect.TypeFor[inspect.Record]())
	defs["Memory"] = ofType(reflect.TypeFor[inspect.Memory]())
	defs["Error"] = ofType(reflect.TypeFor[errorJSON]())
	var lines []object
	for _, kind := range []string{"progress", "report", "eviction", "error", "stream", "record",
		"memory"} {
		lines = append(lines, closed(object{"type": object{"const": kind},
			kind: ref(strings.ToUpper(kind[:1]) + kind[1:])}))
	}
	lines = append(lines, closed(object{"type": object{"const": "decision"},
		"decision": ref("fleet.Decision")}))
	defs["line"] = object{"oneOf": lines}
	return object{"$schema": "https://json-schema.org/draft/2020-12/schema",
		"title": "JSON of vacate and vacated; docs/json.md says which definition is for what",
		"$defs": defs}
}

// docs/schema.json follows from the messages and types that there are.
func TestSchema(t *testing.T) {
	sorted, err := json.Marshal(theSchema())
	if err != nil {
		t.Fatal(err)
	}
	var normal any // with keys and lists of keys in order
	if err := json.Unmarshal(sorted, &normal); err != nil {
		t.Fatal(err)
	}
	sortRequired(normal)
	want, err := json.MarshalIndent(normal, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	want = append(want, '\n')
	if *update {
		if err := os.WriteFile(schemaFile, want, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := os.ReadFile(schemaFile); err != nil || !bytes.Equal(got, want) {
		t.Errorf("docs/schema.json is not what the code writes (%v): go test ./cmd/vacate "+
			"-run TestSchema -update", err)
	}
}

var compiled = sync.OnceValues(func() (*jsonschema.Compiler, error) {
	text, err := os.ReadFile(schemaFile)
	if err != nil {
		return nil, err
	}
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(text))
	if err != nil {
		return nil, err
	}
	c := jsonschema.NewCompiler()
	c.AssertFormat()
	return c, c.AddResource("schema.json", doc)
})

// mustFit checks one or several values of JSON against a definition of docs/schema.json.
func mustFit(t testing.TB, name string, text []byte) (values int) {
	t.Helper()
	c, err := compiled()
	if err != nil {
		t.Fatal(err)
	}
	schema, err := c.Compile("schema.json#/$defs/" + name)
	if err != nil {
		t.Fatal(err)
	}
	for d := json.NewDecoder(bytes.NewReader(text)); d.More(); values++ {
		var v any
		d.UseNumber()
		if err := d.Decode(&v); err != nil {
			t.Fatalf("%v: %s", err, text)
		}
		if err := schema.Validate(v); err != nil {
			t.Errorf("%s: %v\n%s", name, err, text)
		}
	}
	return values
}

// sortRequired sorts the lists of names that must be there.
func sortRequired(v any) {
	switch v := v.(type) {
	case map[string]any:
		if names, ok := v["required"].([]any); ok {
			slices.SortFunc(names, func(a, b any) int {
				return strings.Compare(a.(string), b.(string))
			})
		}
		for _, e := range v {
			sortRequired(e)
		}
	case []any:
		for _, e := range v {
			sortRequired(e)
		}
	}
}

// fillMessage sets the fields of a message to something, or some of them.
func fillMessage(m protoreflect.Message, r *rand.Rand, all bool) {
	value := func(f protoreflect.FieldDescriptor, to protoreflect.Value) protoreflect.Value {
		switch f.Kind() {
		case protoreflect.MessageKind:
			if t, ok := to.Message().Interface().(*timestamppb.Timestamp); ok {
				t.Seconds, t.Nanos = r.Int64N(2e9), r.Int32N(1e9)
			} else {
				fillMessage(to.Message(), r, all)
			}
			return to
		case protoreflect.EnumKind:
			return protoreflect.ValueOfEnum(1)
		case protoreflect.BoolKind:
			return protoreflect.ValueOfBool(true)
		case protoreflect.StringKind:
			return protoreflect.ValueOfString("te\"xt\n")
		case protoreflect.BytesKind:
			return protoreflect.ValueOfBytes([]byte{0, 255})
		case protoreflect.DoubleKind:
			return protoreflect.ValueOfFloat64(r.Float64() * 1e12)
		case protoreflect.Uint32Kind:
			return protoreflect.ValueOfUint32(r.Uint32())
		case protoreflect.Uint64Kind:
			return protoreflect.ValueOfUint64(r.Uint64())
		case protoreflect.Int64Kind:
			return protoreflect.ValueOfInt64(r.Int64())
		}
		return protoreflect.ValueOfInt32(r.Int32())
	}
	for i := range m.Descriptor().Fields().Len() {
		f := m.Descriptor().Fields().Get(i)
		if !all && r.IntN(2) == 0 {
			continue
		}
		switch v := m.NewField(f); {
		case f.IsMap():
			e := v.Map()
			to := protoreflect.Value{}
			if f.MapValue().Kind() == protoreflect.MessageKind {
				to = e.NewValue()
			}
			e.Set(protoreflect.ValueOfString("key").MapKey(), value(f.MapValue(), to))
			m.Set(f, v)
		case f.IsList():
			to := protoreflect.Value{}
			if f.Kind() == protoreflect.MessageKind {
				to = v.List().NewElement()
			}
			v.List().Append(value(f, to))
			m.Set(f, v)
		default:
			m.Set(f, value(f, v))
		}
	}
}

// filled is a daemon that answers everything with messages that are full, partly, or not at all.
type filled struct {
	hostv1.UnimplementedHostHandler
	answers func(proto.Message)
}

func answer[T any, P interface {
	*T
	proto.Message
}](f *filled) (*connect.Response[T], error) {
	m := P(new(T))
	f.answers(m)
	return connect.NewResponse((*T)(m)), nil
}

const anID = "0123456789abcdef0123456789abcdef"

func (f *filled) an(outcome string) *hostv1.Eviction {
	e := new(hostv1.Eviction)
	f.answers(e)
	e.Id, e.Vm, e.Outcome = anID, "web1", outcome
	if e.Report != nil && e.Report.Enlightenment != nil {
		for _, c := range e.Report.Enlightenment.Classes {
			c.Class = "free"
		}
	}
	return e
}

func (f *filled) Status(context.Context, *connect.Request[hostv1.StatusRequest]) (
	*connect.Response[hostv1.StatusResponse], error) {
	return answer[hostv1.StatusResponse](f)
}

func (f *filled) ListVMs(context.Context, *connect.Request[hostv1.ListVMsRequest]) (
	*connect.Response[hostv1.ListVMsResponse], error) {
	return answer[hostv1.ListVMsResponse](f)
}

func (f *filled) ListEvictions(context.Context, *connect.Request[hostv1.ListEvictionsRequest]) (
	*connect.Response[hostv1.ListEvictionsResponse], error) {
	return connect.NewResponse(&hostv1.ListEvictionsResponse{
		Evictions: []*hostv1.Eviction{f.an("completed")}}), nil
}

func (f *filled) WatchEviction(_ context.Context, _ *connect.Request[hostv1.WatchEvictionRequest],
	s *connect.ServerStream[hostv1.Eviction]) error {
	return errors.Join(s.Send(f.an("")), s.Send(f.an("lost contact")))
}

func (f *filled) Evict(context.Context, *connect.Request[hostv1.EvictRequest]) (
	*connect.Response[hostv1.Eviction], error) {
	return connect.NewResponse(f.an("")), nil
}

func (f *filled) Abort(context.Context, *connect.Request[hostv1.AbortRequest]) (
	*connect.Response[hostv1.Eviction], error) {
	return connect.NewResponse(f.an("aborted")), nil
}

func (f *filled) Decide(context.Context, *connect.Request[hostv1.DecideRequest]) (
	*connect.Response[hostv1.Eviction], error) {
	return connect.NewResponse(f.an("discarded")), nil
}

func (f *filled) Export(context.Context, *connect.Request[hostv1.ExportRequest]) (
	*connect.Response[hostv1.ExportResponse], error) {
	return answer[hostv1.ExportResponse](f)
}

func (f *filled) Start(context.Context, *connect.Request[hostv1.StartRequest]) (
	*connect.Response[hostv1.VM], error) {
	return answer[hostv1.VM](f)
}

func (f *filled) Stop(context.Context, *connect.Request[hostv1.StopRequest]) (
	*connect.Response[hostv1.VM], error) {
	return answer[hostv1.VM](f)
}

func (f *filled) ShowVM(context.Context, *connect.Request[hostv1.ShowVMRequest]) (
	*connect.Response[hostv1.ShowVMResponse], error) {
	return answer[hostv1.ShowVMResponse](f)
}

func (f *filled) Doctor(context.Context, *connect.Request[hostv1.DoctorRequest]) (
	*connect.Response[hostv1.DoctorResponse], error) {
	return answer[hostv1.DoctorResponse](f)
}

func (f *filled) Pressure(context.Context, *connect.Request[hostv1.PressureRequest]) (
	*connect.Response[hostv1.PressureResponse], error) {
	return answer[hostv1.PressureResponse](f)
}

func (f *filled) Plan(context.Context, *connect.Request[hostv1.PlanRequest]) (
	*connect.Response[hostv1.PlanResponse], error) {
	return answer[hostv1.PlanResponse](f)
}

// What each command with --json writes has the form of docs/schema.json, whether the daemon's
// answers are full or empty, and so do curl's answers of the same daemon.
func TestJSON(t *testing.T) {
	dir, err := os.MkdirTemp("", "vacate") // short, for the socket
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	socket := filepath.Join(dir, "sock")
	ln, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(1, 2))
	fake := &filled{answers: func(m proto.Message) { fillMessage(m.ProtoReflect(), r, true) }}
	mux := http.NewServeMux()
	mux.Handle(hostv1.NewHostHandler(fake, hostv1.Strict()))
	server := &http.Server{Handler: mux}
	go server.Serve(ln)
	defer server.Close()
	web := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context,
		_, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}}
	post := func(method, body string) (code int, text []byte) {
		t.Helper()
		resp, err := web.Post("http://host/vacate.host.v1.Host/"+method, "application/json",
			strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		var b bytes.Buffer
		b.ReadFrom(resp.Body)
		return resp.StatusCode, b.Bytes()
	}
	for _, test := range []struct {
		args   string // of vacate
		def    string
		method string // of the API that answers the same; empty: none
	}{
		{"ls", "ListVMsResponse", "ListVMs"}, {"start web1", "VM", "Start"},
		{"stop web1", "VM", "Stop"}, {"show web1", "ShowVMResponse", "ShowVM"},
		{"status", "ListEvictionsResponse", "ListEvictions"},
		{"status web1", "Eviction", ""}, {"abort web1", "Eviction", "Abort"},
		{"decide web1 discard --confirm web1 --lose web1", "Eviction", "Decide"},
		{"export web1 file", "ExportResponse", "Export"}, {"doctor", "DoctorResponse", "Doctor"},
		{"pressure", "PressureResponse", "Pressure"}, {"report web1", "Eviction", ""},
		{"relieve --dry-run", "PlanResponse", "Plan"},
		{"evacuate --dry-run", "PlanResponse", ""},
		{"evict web1 --to hostb --skip-checks --detach", "line", ""},
		{"watch web1", "line", ""}, {"evict web1 --to hostb --skip-checks", "line", ""},
		{"report --html", "Error", "Status"},
	} {
		for round := range 20 {
			fake.answers = func(m proto.Message) { fillMessage(m.ProtoReflect(), r, round == 0) }
			if test.method != "" {
				code, text := post(test.method, "{}")
				def := test.def
				if test.method == "Status" {
					def = "StatusResponse"
				}
				if code != http.StatusOK || mustFit(t, def, text) != 1 {
					t.Errorf("%s answers %d: %s", test.method, code, text)
				}
			}
			if test.def == "Error" {
				continue
			}
			out, err := ask(t, append(strings.Fields(test.args), "--socket", socket)...)
			if err != nil { // as the program writes it, behind the rest
				var b bytes.Buffer
				writeError(&b, err)
				mustFit(t, "line", b.Bytes())
			}
			if n := mustFit(t, test.def, out); n == 0 && err == nil {
				t.Errorf("%s writes nothing", test.args)
			}
		}
	}
	for body, want := range map[string]string{
		`{"vm":"web1","too":"hostb"}`:          `unknown field "too"`,
		`{"options":{"rate":"1"}}`:             `unknown field "rate"`,
		`{"vm":"web1","to":"hostb","options":`: "invalid_argument",
		``:                                     "invalid_argument",
	} {
		code, text := post("Evict", body)
		if code != http.StatusBadRequest || !strings.Contains(string(text), "invalid_argument") ||
			!strings.Contains(strings.ReplaceAll(strings.ReplaceAll(string(text), "\u00a0", " "),
				`\"`, `"`), want) {
			t.Errorf("%s: %d %s", body, code, text)
		}
	}
	// As a newer program would ask that does not speak JSON: field 99 of the options.
	q := &hostv1.EvictRequest{Options: &hostv1.EvictOptions{}}
	q.Options.ProtoReflect().SetUnknown([]byte{0x98, 0x06, 1})
	if _, err := hostv1.Dial(socket).Evict(t.Context(),
		connect.NewRequest(q)); connect.CodeOf(err) != connect.CodeInvalidArgument ||
		!strings.Contains(err.Error(), "unknown field in EvictOptions") {
		t.Errorf("an unknown field is answered with %v", err)
	}
}

// What the fleet's brain answers has the form of docs/schema.json, full or empty.
func TestFleetJSON(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	methods := fleetv1.File_internal_fleet_api_v1_fleet_proto.Services().ByName("Fleet").Methods()
	for i := range methods.Len() {
		d := methods.Get(i).Output()
		if d.Name() == "BackupPart" { // which is no answer of a command
			continue
		}
		kind, err := protoregistry.GlobalTypes.FindMessageByName(d.FullName())
		if err != nil {
			t.Fatal(err)
		}
		for round := range 20 {
			m := kind.New()
			fillMessage(m, r, round == 0)
			mustFit(t, "fleet."+string(d.Name()), hostv1.JSON(m.Interface()))
			if d, ok := m.Interface().(*fleetv1.Decision); ok {
				var b bytes.Buffer
				if err := writeLine(&b, "decision", d); err != nil {
					t.Fatal(err)
				}
				mustFit(t, "line", b.Bytes())
			}
		}
	}
}

// ask runs vacate with --json and returns what it writes to standard output.
func ask(t *testing.T, args ...string) ([]byte, error) {
	t.Helper()
	file, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	stdout := os.Stdout
	os.Stdout = file
	defer func() { os.Stdout = stdout }()
	c := rootCommand()
	c.SetArgs(append(args, "--json"))
	c.SetOut(file)
	failed := c.ExecuteContext(t.Context())
	b, err := os.ReadFile(file.Name())
	if err != nil {
		t.Fatal(err)
	}
	return b, failed
}

// The API's report has all that the engine's has.
func TestReportFields(t *testing.T) {
	f := func(s float64) *float64 { return &s }
	now := time.Now().UTC()
	full := evict.Report{Outcome: "completed", Reason: "r", Warnings: []string{"w"}, Machine: "m",
		QEMU: "q", Phases: []evict.Phase{{State: evict.Pushing, At: 1, For: 2}}, Begun: &now,
		Prepare: f(1), Transfer: f(2), Down: f(3), Stood: "s", Total: f(4), Order: "o",
		Pages: evict.PageCounts{Total: 1, Early: 2, Pushed: 3, Near: 4, Fetched: 5, Zero: 6,
			Skipped: 7, Unused: 8, SkippedTouched: 9, Duplicate: 10, Before: 11, GivenBack: 12},
		LinkBytes: 1, Rate: 2, RoundTrip: 3,
		Fetch: &evict.Quantiles{P50: 1, P99: 2, Max: 3, Sum: 4, Count: 5},
		Gaps:  []evict.Gap{{At: 1, For: 2, Again: 3, Why: "w"}},
		Enlightenment: evict.Enlightening{Source: evict.Host, Doubts: "d", Kernel: "k", Attach: 1,
			Survey: 2, First: 3, Known: 4, Notes: []string{"n"}, Stages: &linux.Timings{
				Validate: 1, Scan: 2, FreeLists: 3, Census: 4, Total: 5}, AnswerBytes: 6,
			AnswerCPU: 7, Classes: []evict.ClassCount{{Class: pageclass.Free, Pages: 1, Bytes: 2,
				Early: 3, Pushed: 4, Near: 5, Fetched: 6, Late: 7, Skipped: 8, Unused: 9,
				Zero: 10}}}}
	mustBeFull(t, reflect.ValueOf(full), "Report")
	m, err := hostv1.NewReport(full)
	if err != nil {
		t.Fatal(err)
	}
	back, err := m.Engine()
	if err != nil || !reflect.DeepEqual(back, full) {
		t.Errorf("%v\ngot  %+v\nwant %+v", err, back, full)
	}
}

// mustBeFull checks that no field of a value is left out.
func mustBeFull(t *testing.T, v reflect.Value, name string) {
	t.Helper()
	switch v.Kind() {
	case reflect.Pointer:
		v = v.Elem()
	case reflect.Slice:
		v = v.Index(0)
	}
	if v.Kind() != reflect.Struct || v.Type() == reflect.TypeFor[time.Time]() {
		if v.IsZero() {
			t.Errorf("%s is not filled", name)
		}
		return
	}
	for i := range v.NumField() {
		mustBeFull(t, v.Field(i), name+"."+v.Type().Field(i).Name)
	}
}

// docs/json.md names definitions of the schema, and commands and methods that there are.
func TestJSONDocument(t *testing.T) {
	text, err := os.ReadFile("../../docs/json.md")
	if err != nil {
		t.Fatal(err)
	}
	defs := theSchema()["$defs"].(object)
	methods := hostv1.File_internal_host_api_v1_host_proto.Services().Get(0).Methods()
	rows := 0
	named := map[string]bool{}
	for line := range strings.Lines(string(text)) {
		cells := strings.Split(line, " | ")
		if !strings.HasPrefix(line, "| `vacate ") {
			continue
		}
		rows++
		for _, m := range regexp.MustCompile("`vacate ([a-z]+)( [a-z]+)?").FindAllStringSubmatch(
			cells[0], -1) {
			named[m[1]] = true
		}
		if len(cells) != 3 {
			continue
		}
		if _, ok := defs[cells[1]]; !ok {
			t.Errorf("there is no definition %q", cells[1])
		}
		for _, name := range strings.Split(strings.Trim(cells[2], " |\n"), ", ") {
			if !strings.HasPrefix(name, "in ") && methods.ByName(protoreflect.Name(name)) == nil {
				t.Errorf("there is no method %q", name)
			}
		}
	}
	if rows == 0 {
		t.Error("no row was read")
	}
	for _, c := range rootCommand().Commands() {
		list := append(c.Commands(), c)
		for _, sub := range list {
			if sub.Flags().Lookup("json") != nil && !named[c.Name()] {
				t.Errorf("docs/json.md does not name `%s --json`", sub.CommandPath())
			}
		}
		delete(named, c.Name())
	}
	if len(named) > 0 {
		t.Errorf("there are no commands %v", named)
	}
}

// So has what vacate inspect writes.
func TestInspectJSON(t *testing.T) {
	var b bytes.Buffer
	for _, v := range []any{new(inspect.Stream), new(inspect.Memory)} {
		if err := writeValue(&b, strings.ToLower(reflect.TypeOf(v).Elem().Name()),
			v); err != nil {
			t.Fatal(err)
		}
	}
	for _, file := range []string{"pc-bare.forward.gz", "q35-virtio.return.gz"} {
		out, err := ask(t, "inspect", "stream", "--records",
			"../../internal/qemu/migstream/testdata/"+file)
		if err != nil {
			t.Fatal(err)
		}
		b.Write(out)
	}
	if n := mustFit(t, "line", b.Bytes()); n < 10 {
		t.Errorf("%d lines: %s", n, b.String())
	}
}
