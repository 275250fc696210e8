"""Writes the parts of which common passwords are made: words, names, keyboard walks, dates.

What stands here is our own selection of what people are known to choose. `helixflow.auth.common_passwords` undoes usual
disguises (case, digits for letters, signs and digits at the ends) and takes one part, or two together, as common.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from helixflow.auth.common_passwords import fold

TARGET: Final = Path("src/helixflow/auth/common_passwords.txt")
MIN_PART_CHARS: Final = 3

WORDS: Final = """
password passwort passwd passphrase pass word secret secrets secure security login logon signin signup letmein welcome
hello hallo bonjour hola ciao access open opensesame sesame enter changeme change default example sample test testing
tester tests demo guest user users admin administrator adm root toor super superuser sysadmin system sys operator
owner manager master mastermind boss chief staff support service server client computer laptop desktop windows linux
ubuntu debian fedora android iphone ipad macbook apple google facebook twitter instagram youtube linkedin microsoft
amazon netflix spotify samsung nokia sony playstation xbox nintendo minecraft roblox fortnite pokemon pikachu zelda
mario luigi helixflow helix flow inference model models tensor llama mistral openai chatgpt gemini claude docker
kubernetes postgres postgresql mysql mariadb oracle database redis mongo elastic jenkins github gitlab python java
javascript private public internet network wireless router cisco switch firewall hacker hackers hacking matrix neo
trinity morpheus anonymous shadow ghost phantom spirit angel angels demon devil dragon dragons phoenix unicorn wizard
witch magic magical merlin gandalf frodo bilbo aragorn legolas sauron hobbit hogwarts harry potter harrypotter
dumbledore hermione voldemort starwars skywalker vader darthvader yoda jedi sith chewbacca solo leia obiwan startrek
spock kirk picard enterprise batman superman spiderman ironman wolverine deadpool joker robin catwoman hulk thor loki
captain america avengers marvel superhero hero princess prince queen king kingdom knight lord lady duke baron emperor
empire royal castle crown diamond diamonds ruby emerald sapphire pearl crystal silver golden gold platinum bronze
copper iron steel metal metallica slayer megadeth nirvana queenband beatles stones rolling acdc kiss eminem rihanna
beyonce shakira madonna elvis bowie hendrix floyd pinkfloyd ledzeppelin rock rocknroll rocker punk jazz blues music
musical guitar piano drums drummer bass violin singer song songs dance dancer dancing party disco summer sommer winter
spring autumn herbst fruehling fall season january february march april may june july august september october
november december januar februar maerz mai juni juli oktober dezember monday tuesday wednesday thursday friday
saturday sunday montag dienstag mittwoch donnerstag freitag samstag sonntag weekend holiday holidays vacation birthday
christmas easter halloween newyear today tomorrow yesterday always never forever ever love lover lovers loveyou
iloveyou ilove loveme mylove truelove lovely amor amour teamo tequiero jetaime ichliebedich liebe schatz hate hater
peace happy happiness sad smile smiley laugh funny crazy fun joy hope faith trust trustno trustme believe dream dreams
dreamer dreaming wish wishes lucky luck fortune destiny freedom liberty justice honor honour glory victory winner
winners loser champion champions best better good great awesome amazing cool nice sweet sweetie sweetheart sweety
honey baby babygirl babyboy babe darling dear cutie cute pretty beautiful beauty gorgeous sexy sexygirl hot hottie
girl girls boy boys man men woman women lady child children kids family familia famille mother mom mommy mum mummy
mama father dad daddy papa sister brother son daughter grandma grandpa nana friend friends bestfriend buddy dude bro
sis life live living alive death dead die killer kill murder blood vampire zombie monster beast fire flame flames
burning ice snow snowball snowflake snowman rain rainbow raindrop storm thunder lightning wind cloud clouds sky blue
blackandwhite black white red green yellow orange purple pink brown grey gray violet indigo magenta cyan turquoise
silverado color colour sun sunny sunshine sunrise sunset sunflower moon moonlight moonshine star stars starlight
starfish galaxy space cosmos universe planet earth world mars venus jupiter saturn neptune pluto mercury apollo zeus
athena hermes poseidon hades ares odin titan atlas orion pegasus earthquake ocean sea beach wave waves surf surfer
surfing swim swimmer swimming water river lake island mountain mountains hill valley forest jungle desert tree trees
flower flowers rose roses lily lilies tulip daisy daisies violets orchid jasmine lavender iris cherry cherries apple
apples banana bananas orange oranges lemon lemons lime mango peach peaches grape grapes strawberry blueberry raspberry
blackberry coconut pineapple melon watermelon kiwi potato tomato carrot onion garlic pepper ginger cinnamon vanilla
chocolate cookie cookies cupcake cake candy sugar honeybee butter butterfly cheese cheesecake cream icecream pizza
burger hamburger pasta spaghetti noodle taco burrito sushi bacon chicken turkey coffee espresso latte tea beer wine
whiskey vodka tequila rum cocktail martini drink milk water cola pepsi cocacola sprite redbull marlboro smoke smoking
weed cannabis marijuana ganja animal animals dog dogs doggy doggie puppy puppies cat cats kitty kitten kittens
hellokitty pussy pussycat horse horses pony mustang stallion cow bull bulls bulldog pig piggy sheep goat duck goose
rooster rabbit bunny bunnies mouse mice rat hamster squirrel fox foxes foxy wolf wolves wolfpack bear bears teddybear
teddy panda pandas koala lion lions tiger tigers leopard panther panthers jaguar cheetah cougar puma lynx elephant
elephants giraffe zebra rhino hippo monkey monkeys gorilla chimp ape snake snakes cobra viper python anaconda lizard
turtle turtles tortoise crocodile alligator gator gators frog toad fish fishing fisher fisherman shark sharks whale
dolphin dolphins octopus squid crab lobster bird birds birdie eagle eagles falcon falcons hawk hawks raven ravens crow
owl parrot penguin penguins pigeon dove swan peacock flamingo spider scorpion ant bee bees hornet hornets wasp beetle
ladybug bug bugs football footballer soccer soccerball baseball softball basketball volleyball hockey tennis golf
golfer golfing cricket rugby boxing boxer wrestling karate judo ninja ninjas samurai warrior warriors fighter soldier
sniper gunner ranger rangers hunter hunting marine marines army navy airforce military police cop fireman firefighter
doctor nurse lawyer teacher student students school highschool college university class classof teacher engineer
mechanic driver racing racer race nascar formula ferrari porsche lamborghini bugatti mercedes benz bmw audi volkswagen
toyota honda yamaha suzuki kawasaki ducati harley davidson harleydavidson nissan mazda subaru mitsubishi hyundai volvo
saab renault peugeot citroen fiat alfaromeo skoda seat opel ford chevrolet chevy corvette camaro cadillac dodge viper
chrysler jeep jaguar landrover bentley rollsroyce tesla truck trucker trucks car cars bike biker bikes bicycle
motorcycle motorbike motocross skateboard skater skate snowboard skiing ski sailing sailor boat ship pirate pirates
treasure airplane aeroplane pilot flying flyer rocket rockets spaceship yankees redsox dodgers giants mets cubs
cardinals braves phillies astros cowboys steelers packers patriots broncos raiders redskins vikings dolphins jets
chargers chiefs saints colts bengals browns titans lakers celtics knicks heat spurs mavericks rockets magic pistons
bruins maple leafs canadiens rangers blackhawks redwings flyers barcelona realmadrid madrid atletico valencia sevilla
arsenal chelsea liverpool manchester united manutd mancity city everton tottenham newcastle leeds celtic rangersfc
juventus milan inter roma napoli lazio bayern bayernmunich dortmund schalke hamburg werder stuttgart leverkusen ajax
feyenoord psv benfica porto sporting galatasaray fenerbahce besiktas flamengo corinthians palmeiras santos saopaulo
boca river plate ronaldo ronaldinho messi neymar beckham zidane pele maradona rooney jordan kobe lebron shaq federer
nadal schumacher hamilton usa england britain london scotland ireland wales france paris germany deutschland berlin
munich muenchen koeln frankfurt austria wien vienna switzerland schweiz zurich italy italia rome venice spain espana
portugal lisbon lisboa greece athens turkey istanbul ankara russia moscow ukraine kiev poland polska warsaw warszawa
krakow sweden stockholm norway oslo denmark copenhagen finland helsinki holland netherlands amsterdam belgium brussels
india delhi mumbai bangalore pakistan karachi china beijing shanghai hongkong taiwan japan tokyo osaka korea seoul
vietnam saigon thailand bangkok indonesia jakarta malaysia singapore philippines manila pinoy australia sydney
melbourne canada toronto montreal vancouver mexico brazil brasil argentina colombia chile peru cuba havana jamaica
africa egypt cairo nigeria lagos kenya newyork newyorkcity brooklyn manhattan bronx queens chicago boston philadelphia
washington dallas houston austin texas denver colorado phoenix arizona vegas lasvegas nevada california hollywood
losangeles sanfrancisco sandiego seattle portland oregon miami florida orlando atlanta georgia carolina virginia
tennessee nashville memphis kentucky ohio cleveland cincinnati detroit michigan minnesota wisconsin indiana alaska
hawaii aloha money cash dollar dollars euro million millionaire billion rich bank banking bitcoin crypto ethereum
business company office work working worker job career project projects account accounts finance sales marketing
office house home homesweethome room door window kitchen garden street road highway bridge tower building hotel casino
poker blackjack game games gamer gaming player players play playing playboy chess ball balls goal score team teamo
club clubs member members group power powers powerful energy force strong strength mighty ultimate extreme maximum
turbo nitro dynamite bomb bomber boom bang bullet gun guns pistol rifle shotgun sword blade knife arrow archer hammer
anchor engine machine robot robots cyborg alien aliens ufo area hellyeah hell heaven god godisgood godislove jesus
jesuschrist christ christian church bible blessed blessing grace mercy pray prayer holy saint allah islam muslim
muhammad bismillah buddha krishna shiva ganesh jesuslovesme cross savior lordjesus spongebob patrick squidward mickey
mickeymouse minnie donald donaldduck goofy pluto disney disneyland simba nemo dory bambi dumbo tinkerbell cinderella
snowwhite rapunzel elsa anna olaf shrek fiona garfield snoopy scooby scoobydoo simpson simpsons homer bart lisa maggie
marge southpark cartman familyguy stewie naruto sasuke sakura goku vegeta dragonball onepiece luffy bleach ichigo
sailormoon totoro qwertz azerty computerlove number numbers one two three four five six seven eight nine ten hundred
thousand zero eins zwei drei vier fuenf uno dos tres first second third last only lonely alone nothing something
anything everything everyone nobody somebody whatever whatsup wassup blah blahblah lol lmao rofl haha hahaha hehe
asshole bitch bastard fuck fucker fucking fuckyou fuckme fuckoff motherfucker shit bullshit dick dickhead cock porn
sex hardcore pussy suckit viagra stupid idiot moron dumb dumbass silly genius smart clever brain brains mind soul
heart hearts heartbreak broken brokenheart tears cry crying pain painful fear scary scared danger dangerous wild free
freebird easy hard soft simple quick fast faster slow speed speedy run runner running jump jumper walk walking fly
fight stop start begin end ending forgot forget forgotten remember remember memory memories mine yours myself yourself
mypassword mypass yourpassword thepassword newpassword oldpassword nopassword passwordpassword asdf qwerty abcdef
abcabc letmeinnow iamgod imthebest correct horse battery staple monkeys dragonfly firefly
moonbeam seashell pineapples mellow purple haze bubbles bubble bubblegum jellybean jelly peanut peanutbutter pumpkin
pumpkins cupid valentine valentina tinker bell buttercup poppy clover willow maple aspen cedar oak birch bamboo ivy
fern meadow brook stone rocky sandy dusty stormy misty foggy smokey shady lucky12 scooter skippy bandit bailey buster
rusty sparky spike spot rover fido rex duke max toby cooper milo oscar felix simba tigger whiskers mittens boots socks
fluffy patches oreo snickers twix kitkat milky wayne sugarplum cocoa mocha caramel toffee marshmallow brownie muffin
waffles pancake biscuit pickle pickles noodles dumpling wasabi pepperoni salami kitchenaid toyota1 nintendo64 gameboy
sega atari commodore amiga counterstrike halflife halo warcraft worldofwarcraft starcraft diablo doom quake callofduty
assassin skyrim fallout overwatch leagueoflegends dota steam twitch discord runescape sims tetris pacman sonic kirby
donkeykong metroid megaman streetfighter tekken
"""

NAMES: Final = """
james john robert michael william david richard joseph thomas charles christopher daniel matthew anthony mark donald
steven stephen paul andrew joshua kenneth kevin brian george timothy ronald edward jason jeffrey ryan jacob gary
nicholas eric jonathan larry justin scott brandon benjamin samuel gregory alexander frank raymond jack dennis jerry
tyler aaron jose adam nathan henry douglas zachary peter kyle noah ethan jeremy walter christian keith roger terry
austin sean gerald carl harold dylan arthur lawrence jordan jesse bryan billy bruce gabriel joe logan alan juan albert
willie elijah wayne randy vincent mason roy ralph bobby russell bradley philip eugene liam lucas oliver aiden owen
caleb isaac luke connor hunter evan cameron chase cole blake trevor mary patricia jennifer linda elizabeth barbara
susan jessica sarah karen lisa nancy betty sandra margaret ashley kimberly emily donna michelle carol amanda melissa
deborah stephanie dorothy rebecca sharon laura cynthia amy kathleen angela shirley brenda emma pamela nicole samantha
katherine christine helen debra rachel carolyn janet maria catherine heather diane olivia julie joyce victoria ruth
virginia lauren kelly christina joan evelyn judith andrea hannah megan cheryl jacqueline martha madison teresa gloria
sara janice ann kathryn abigail sophia frances jean alice judy isabella julia grace denise amber doris marilyn
danielle beverly charlotte natalie theresa diana brittany kayla alexis lori marie tiffany tina crystal erin mia ava
chloe zoe lily ella claire lucy molly sophie jasmine courtney vanessa sabrina monica veronica natasha tatiana bianca
carmen rosa ana lucia elena sofia camila valeria daniela fernanda alejandra gabriela mariana carolina paula adriana
claudia silvia pilar dolores miguel carlos luis jorge pedro manuel francisco antonio javier rafael fernando alejandro
diego sergio pablo eduardo ricardo roberto mario raul oscar ramon enrique alberto hector victor andres hugo ivan marco
matteo luca lorenzo giovanni giuseppe francesco alessandro andrea stefano paolo roberto giulia chiara francesca
federica martina elisa pierre jean michel philippe nicolas laurent julien antoine guillaume sebastien camille marie
sophie isabelle nathalie sandrine celine aurelie emilie charlotte hans peter klaus wolfgang juergen dieter manfred uwe
bernd frank thomas stefan andreas markus matthias sebastian florian tobias jan lukas felix jonas leon maximilian
moritz niklas finn anna lena lea sarah laura julia katharina sabine petra monika ursula claudia susanne birgit heike
anja nadine melanie nicole steffi jana lars sven bjorn erik olaf anders nils johan gustav axel ingrid astrid freya
sigrid annika ivan dmitri sergei vladimir alexei andrei mikhail nikolai yuri boris igor oleg anastasia svetlana olga
irina natalia ekaterina marina ludmila jakub piotr pawel krzysztof tomasz marcin michal katarzyna agnieszka magdalena
malgorzata joanna monika mohamed mohammed muhammad ahmed ali hassan hussein omar ibrahim yusuf mustafa khalid abdullah
fatima aisha khadija maryam zainab layla mehmet murat emre burak ayse elif zeynep raj rahul amit sanjay vijay ravi
suresh ramesh anil sunil deepak rajesh arjun krishna priya pooja neha anjali sunita kavita divya lakshmi sandeep manoj
ashok vikram wei ming jing li wang zhang chen liu yang huang zhao zhou xiaoming xiaohong takashi hiroshi kenji satoshi
yuki sakura haruka akira kazuki minjun jihoon jiyeon minji nguyen tuan linh thanh minh duc huong alex sam chris mike
nick tony steve dave rob bob bill jim tom tim ben dan matt josh jake zach max leo theo charlie archie freddie alfie
oscar harry georgia millie poppy daisy rosie ruby evie freya isla amelia ellie katie jess becky vicky mandy sandy
wendy cindy mindy debbie kathy cathy patty peggy penny holly ginger jade pearl smith johnson williams brown jones
garcia miller davis rodriguez martinez hernandez lopez gonzalez wilson anderson taylor moore jackson martin lee perez
thompson white harris sanchez clark ramirez lewis robinson walker young allen wright torres hill flores green adams
nelson baker hall rivera campbell mitchell carter roberts mueller schmidt schneider fischer weber meyer wagner becker
hoffmann
"""

# Rows of keyboards as they are laid out, and the columns that fingers walk down.
ROWS: Final = (
    "1234567890",
    "0123456789",
    "qwertyuiop",
    "asdfghjkl",
    "zxcvbnm",
    "qwertzuiopü",
    "yxcvbnm",
    "azertyuiop",
    "qsdfghjklm",
    "wxcvbn",
    "йцукенгшщзхъ",
    "фывапролджэ",
    "ячсмитьбю",
    "abcdefghijklmnopqrstuvwxyz",
)
GRIDS: Final = (
    ("1234567890", "qwertyuiop", "asdfghjkl;", "zxcvbnm,./"),
    ("1234567890", "qwertzuiop", "asdfghjklö", "yxcvbnm,.-"),
    ("1234567890", "abcdefghij"),
    ("abcdefghij", "1234567890"),
)
KEYPAD: Final = ("147", "258", "369", "159", "357", "741", "852", "963", "789456123", "147258369", "159357")
YEARS: Final = range(1930, 2036)
_MONTH_DAYS: Final = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
_LONGEST_WALK: Final = 30


def write_common_passwords(root: Path) -> None:
    """One part a line, sorted."""
    target = root / TARGET
    target.parent.mkdir(parents=True, exist_ok=True)
    parts = {part for text in _parts() if len(part := fold(text)) >= MIN_PART_CHARS}
    target.write_text("".join(f"{part}\n" for part in sorted(parts)), encoding="utf-8")


def _parts() -> Iterator[str]:
    yield from WORDS.split()
    yield from NAMES.split()
    for row in ROWS:
        yield from _walks(row)
        yield from _walks(row[::-1])
    for grid in GRIDS:
        yield from _columns(grid)
    yield from KEYPAD
    yield from map(str, YEARS)
    for month, days in enumerate(_MONTH_DAYS, 1):
        for day in range(1, days + 1):
            yield f"{day:02}{month:02}"
            yield f"{month:02}{day:02}"


def _walks(row: str) -> Iterator[str]:
    """Along a row from every key on, and round it again, as in 123456789012."""
    keys = fold(row)
    for start in range(len(keys)):
        for length in range(MIN_PART_CHARS, min(len(keys), 12) + 1):
            yield (keys * 2)[start : start + length]
    for length in range(len(keys), min(_LONGEST_WALK, 2 * len(keys)) + 1):
        yield (keys * 2)[:length]


def _columns(grid: tuple[str, ...]) -> Iterator[str]:
    """1qaz2wsx3edc, 1q2w3e4r5t, qawsedrf and their likes: down two, three or four rows, from left to right or back."""
    for first in range(len(grid)):
        for last in range(first + 2, len(grid) + 1):
            columns = ["".join(keys) for keys in zip(*grid[first:last], strict=False)]
            for order in (
                columns,
                columns[::-1],
                [column[::-1] for column in columns],
                [*map(_reversed, columns[::-1])],
            ):
                for start in range(len(order)):
                    for end in range(start + 1, len(order) + 1):
                        yield "".join(order[start:end])
                zigzag = "".join(column if at % 2 == 0 else column[::-1] for at, column in enumerate(order))
                yield from (zigzag[:length] for length in range(4, len(zigzag)))


def _reversed(text: str) -> str:
    return text[::-1]
